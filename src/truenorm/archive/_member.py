"""A member of a zip archive as a file that can be read at any place, its checksum verified."""

from __future__ import annotations

import io
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any

MIB = 2**20
_LOCAL_HEADER, _LENGTHS = 30, struct.Struct("<HH")
"""Bytes before a member's name; the lengths of name and extra field are the last of them."""


@contextmanager
def checked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Generator[IO[bytes]]:
    """The member, which has been read to its end: where it is in the file, or unpacked."""
    file: Any = archive.fp
    with archive.open(info) as member, tempfile.SpooledTemporaryFile(max_size=64 * MIB) as copy:
        if info.compress_type == zipfile.ZIP_STORED:  # as Keras writes it: it need not be copied
            while member.read(MIB):
                pass
            yield io.BufferedReader(_Part(file, _start(file, info), info.file_size))
        else:
            shutil.copyfileobj(member, copy, MIB)
            copy.seek(0)
            yield copy


def _start(file: Any, info: zipfile.ZipInfo) -> int:
    """Where the member's bytes begin: its name may be of another length than in the directory."""
    file.seek(info.header_offset + _LOCAL_HEADER - _LENGTHS.size)
    return info.header_offset + _LOCAL_HEADER + sum(_LENGTHS.unpack(file.read(_LENGTHS.size)))


class _Part(io.RawIOBase):
    """A stretch of a file."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self._file, self._first, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(self._size - self._at, 0)]
        self._file.seek(self._first + self._at)
        read = self._file.readinto(wanted)
        self._at += read
        return read
