"""What a function does, as a hash: the same code and the same values give the same one.

A study that is called again must know whether it is the same study. The memory address, file and
line of a function say nothing about that; its compiled code, the values that it closes over, and
the functions and classes of the same module that it names do.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import itertools
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

import keras
import numpy as np

from truenorm._model.values import in_memory

_HAS_DOCSTRING = 0x4000000
"""A flag of compiled code, from Python 3.14 on."""

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


Seen = dict[int, tuple[int, Any]]
"""What was met, by its id, with its number."""

_MEMBERS = (types.FunctionType, int, float, str)
_VALUES = (list, tuple, dict, set, frozenset, bytes, functools.partial, np.ndarray, type)
"""What counts of a class's attributes; of Python's own (``__name__``) only the first kinds do."""


def code_digest(value: Any) -> str:
    """SHA-256 of a function, class or value, and of what it refers to in its own module."""
    made = hashlib.sha256()
    for part in _parts(value, {}):
        made.update(part)
        made.update(b"\0")
    return made.hexdigest()


def _parts(value: Any, seen: Seen) -> Iterator[bytes]:
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}".encode()
        return
    seen[id(value)] = (len(seen), value)  # held, so that nothing else can get its id
    items = _items(value)
    if items is not None:
        yield f"{type(value).__name__} {len(items)}".encode()
        for item in items:
            yield from _parts(item, seen)
    elif _is_array(value):
        yield from _array(in_memory(value), seen)
    elif isinstance(value, types.CodeType):
        yield from _code(value, seen)
    elif isinstance(value, types.FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, type):
        yield from _class(cast(type[Any], value), seen)
    else:
        yield _name(type(value)).encode()
        if not is_of_a_library(type(value)):
            yield from _class(type(value), seen)
        yield from _parts(_state(value), seen)


def _items(value: Any) -> tuple[Any, ...] | None:
    """The values that a container is, a partial function or a method; None for all else."""
    if isinstance(value, dict):
        return tuple(itertools.chain.from_iterable(cast(dict[Any, Any], value).items()))
    if isinstance(value, set | frozenset):
        return tuple(sorted(code_digest(item) for item in cast(set[Any], value)))
    if isinstance(value, list | tuple):
        return tuple(cast(list[Any], value))
    if isinstance(value, functools.partial):
        given = cast(functools.partial[Any], value)
        return given.func, given.args, given.keywords
    return (value.__func__, value.__self__) if isinstance(value, types.MethodType) else None


def _is_array(value: Any) -> bool:
    """Whether it is an array, a number of NumPy's, or a tensor or variable of any framework."""
    if isinstance(value, type | keras.KerasTensor) or not hasattr(value, "__array__"):
        return False
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _array(array: np.ndarray[Any, Any], seen: Seen) -> Iterator[bytes]:
    yield f"{array.dtype.str}{array.shape}".encode()
    if array.dtype.hasobject:  # whose bytes are addresses
        yield from _parts(array.tolist(), seen)
    else:
        yield np.ascontiguousarray(array).tobytes()


def _state(value: Any) -> Any:
    """What an object holds; of one without attributes, as a path or a range, what makes it."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    if hasattr(value, "__dict__"):
        return value.__dict__
    try:
        reduce: Any = copyreg.dispatch_table.get(type(value))  # as of a regular expression
        made: Any = value.__reduce_ex__(2) if reduce is None else reduce(value)
    except (TypeError, ValueError, AttributeError, RuntimeError, pickle.PicklingError):
        return None  # a lock, a file, a generator: there is nothing to compare
    return made if isinstance(made, str) else [*made[1:3], *map(list, filter(None, made[3:5]))]


def _code(code: types.CodeType, seen: Seen) -> Iterator[bytes]:
    yield code.co_code
    yield " ".join((*code.co_names, *code.co_varnames, *code.co_freevars)).encode()
    for constant in code.co_consts[_has_docstring(code) :]:
        yield from _parts(constant, seen)


def _has_docstring(code: types.CodeType) -> bool:
    """Whether the first constant is a docstring, or None in the place of one."""
    if sys.version_info >= (3, 14):
        return bool(code.co_flags & _HAS_DOCSTRING)
    return not code.co_name.startswith("<")  # as a list comprehension's, which never has one


def _function(function: types.FunctionType, seen: Seen) -> Iterator[bytes]:
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
        yield from _parts(function.__globals__[name], seen)


def _names(code: types.CodeType) -> set[str]:
    """The global names of a function and of the functions inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _class(kind: type[Any], seen: Seen) -> Iterator[bytes]:
    yield _name(kind).encode()
    if is_of_a_library(kind):
        return
    for base in kind.__bases__:
        yield from _parts(base, seen)
    for name, member in sorted(vars(kind).items()):
        function = _function_in(member)
        kinds = _MEMBERS if name.startswith("__") else _MEMBERS + _VALUES
        if isinstance(function, kinds):
            yield name.encode() if not name.startswith("__") or callable(function) else b""
            if name not in ("__module__", "__doc__", "__firstlineno__", "__qualname__"):
                yield from _parts(function, seen)


def _function_in(member: Any) -> Any:
    """The function in a static method, a property, a cache or the like; else the member itself."""
    if isinstance(member, types.FunctionType | functools.partial | type):
        return member
    inside = (getattr(member, name, None) for name in ("__wrapped__", "fget", "func"))
    return next(filter(None, inside), member)


def is_of_a_library(thing: Any) -> bool:
    """Whether it comes from an installed package: then its name stands for it."""
    module = thing if isinstance(thing, types.ModuleType) else inspect.getmodule(thing)
    path = getattr(module, "__file__", None)
    name = str(getattr(module, "__name__", ""))
    return name == "builtins" or name.split(".")[0] == "truenorm" or "site-packages" in str(path)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
