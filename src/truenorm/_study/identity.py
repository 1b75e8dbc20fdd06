"""What a function does, as a hash: the same code and the same values give the same one.

A study that is called again must know whether it is the same study. The memory address, file and
line of a function say nothing about that; its compiled code, the values that it closes over, and
the functions and classes of the same module that it names do.
"""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def code_digest(value: Any) -> str:
    """SHA-256 of a function, class or value, and of what it refers to in its own module."""
    made = hashlib.sha256()
    for part in _parts(value, set()):
        made.update(part)
        made.update(b"\0")
    return made.hexdigest()


def _parts(value: Any, seen: set[int]) -> Iterator[bytes]:
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    if id(value) in seen:
        yield b"again"
        return
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        yield f"{value.dtype.str}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, types.CodeType):
        yield from _code(value, seen)
    elif isinstance(value, types.FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, types.MethodType):
        yield from _parts(value.__func__, seen)
        yield from _parts(value.__self__, seen)
    elif isinstance(value, type):
        yield from _class(cast(type[Any], value), seen)
    elif isinstance(value, dict | list | tuple | set | frozenset):
        yield type(value).__name__.encode()
        yield from _items(value, seen)
    else:
        yield _name(type(value)).encode()
        if not is_of_a_library(type(value)):
            yield from _class(type(value), seen)
        yield from _parts(getattr(value, "__dict__", None), seen)


def _code(code: types.CodeType, seen: set[int]) -> Iterator[bytes]:
    yield code.co_code
    yield " ".join((*code.co_names, *code.co_varnames, *code.co_freevars)).encode()
    for constant in code.co_consts:
        if not isinstance(constant, types.CodeType) and code.co_consts[0] is constant:
            continue  # the docstring, where there is one
        yield from _parts(constant, seen)


def _function(function: types.FunctionType, seen: set[int]) -> Iterator[bytes]:
    if is_of_a_library(function):
        yield _name(function).encode()
        return
    yield from _parts(function.__code__, seen)
    yield from _parts(function.__defaults__, seen)
    yield from _parts(function.__kwdefaults__, seen)
    for cell in function.__closure__ or ():
        try:
            yield from _parts(cell.cell_contents, seen)
        except ValueError:  # a name that is not bound yet
            yield b"unbound"
    for name in sorted(_names(function.__code__) & function.__globals__.keys()):
        named = function.__globals__[name]
        if isinstance(named, types.ModuleType):
            yield f"module {named.__name__}".encode()
        else:
            yield from _parts(named, seen)


def _names(code: types.CodeType) -> set[str]:
    """The global names of a function and of the functions inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _class(kind: type[Any], seen: set[int]) -> Iterator[bytes]:
    yield _name(kind).encode()
    if is_of_a_library(kind):
        return
    for base in kind.__bases__:
        yield from _parts(base, seen)
    for name, member in sorted(vars(kind).items()):
        function = getattr(member, "__func__", member)
        if isinstance(function, types.FunctionType | int | float | str):
            yield name.encode() if not name.startswith("__") or callable(function) else b""
            if name not in ("__module__", "__doc__", "__firstlineno__", "__qualname__"):
                yield from _parts(function, seen)


def _items(value: Any, seen: set[int]) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key, item in cast(dict[Any, Any], value).items():
            yield from _parts(key, seen)
            yield from _parts(item, seen)
    elif isinstance(value, set | frozenset):
        yield "".join(sorted(code_digest(item) for item in cast(set[Any], value))).encode()
    else:
        for item in cast(list[Any], value):
            yield from _parts(item, seen)


def is_of_a_library(thing: Any) -> bool:
    """Whether it comes from an installed package: then its name stands for it."""
    module = thing if isinstance(thing, types.ModuleType) else inspect.getmodule(thing)
    path = getattr(module, "__file__", None)
    name = str(getattr(module, "__name__", ""))
    return name == "builtins" or name.split(".")[0] == "truenorm" or "site-packages" in str(path)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
