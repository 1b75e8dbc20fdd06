"""XLA's part in a typed call, played by ctypes, with the structs of ``xla/ffi/api/c_api.h``."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p, pointer, sizeof
from typing import Any

import numpy as np

DTYPES = {"int32": 4, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}


class Extension(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p))


class Version(ctypes.Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extensions", c_void_p)),
        *(("major", c_int), ("minor", c_int)),
    )


class Metadata(ctypes.Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("version", Version)),
        *(("traits", c_uint32), ("state_type", c_int64)),
    )


class MetadataExtension(ctypes.Structure):
    _fields_ = (("base", Extension), ("metadata", POINTER(Metadata)))


class Error(ctypes.Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extensions", c_void_p)),
        *(("message", c_char_p), ("code", c_int)),
    )


CreateError = ctypes.CFUNCTYPE(c_void_p, POINTER(Error))


class Api(ctypes.Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extensions", c_void_p), ("version", Version)),
        *(("internal", c_void_p), ("create_error", CreateError), ("others", c_void_p * 17)),
    )


class Buffer(ctypes.Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extensions", c_void_p), ("dtype", c_int)),
        *(("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))),
    )


class Buffers(ctypes.Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extensions", c_void_p), ("size", c_int64)),
        *(("types", POINTER(c_int)), ("items", POINTER(POINTER(Buffer)))),
    )


class Attributes(ctypes.Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extensions", c_void_p), ("size", c_int64)),
        *(("types", c_void_p), ("names", c_void_p), ("items", c_void_p)),
    )


class Frame(ctypes.Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extensions", POINTER(Extension)), ("api", POINTER(Api))),
        *(("context", c_void_p), ("stage", c_int), ("args", Buffers), ("rets", Buffers)),
        *(("attributes", Attributes), ("future", c_void_p)),
    )


class XlaError(Exception):
    """What the function reported: a code of XLA's, and words."""


class Xla:
    """One XLA, of a version, that registers and calls a function."""

    def __init__(self, function: Any, major: int = 0, minor: int = 3) -> None:
        self.function = function
        function.restype, function.argtypes = c_void_p, (POINTER(Frame),)
        self.errors: list[tuple[int, str]] = []
        self.create_error = CreateError(self._create_error)
        version = Version(sizeof(Version), None, major, minor)
        self.api: Api | None = Api(sizeof(Api), None, version, None, self.create_error)
        self.frame_size = Frame.future.offset
        self.buffer_size = sizeof(Buffer)

    def _create_error(self, error: Any) -> int:
        self.errors.append((error.contents.code, error.contents.message.decode()))
        return len(self.errors)

    def _call(self, **fields: Any) -> None:
        api = self.api and pointer(self.api)
        frame = Frame(struct_size=self.frame_size, api=api, **fields)
        if self.function(pointer(frame)):
            raise XlaError(*self.errors[-1])

    def register(self) -> tuple[int, int]:
        """The version that the function says it was made for."""
        metadata = Metadata(sizeof(Metadata), Version(sizeof(Version)))
        base = Extension(sizeof(MetadataExtension), 1)
        asked = MetadataExtension(base, pointer(metadata))
        self._call(extensions=ctypes.cast(pointer(asked), POINTER(Extension)))
        return metadata.version.major, metadata.version.minor

    def buffer(self, array: np.ndarray, shape: tuple[int, ...] | None = None) -> Buffer:
        shape = array.shape if shape is None else shape
        dims = (c_int64 * len(shape))(*shape)
        dtype = DTYPES.get(array.dtype.name, 1)
        return Buffer(self.buffer_size, None, dtype, array.ctypes.data, len(shape), dims)

    def call(self, arguments: list[Buffer], results: list[Buffer], stage: int = 3) -> None:
        self._call(stage=stage, args=_buffers(arguments), rets=_buffers(results))


def _buffers(buffers: list[Buffer]) -> Buffers:
    count = len(buffers)
    items = (POINTER(Buffer) * count)(*map(pointer, buffers))
    return Buffers(sizeof(Buffers), None, count, (c_int * count)(*[1] * count), items)
