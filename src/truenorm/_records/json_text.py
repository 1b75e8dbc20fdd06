"""Records as JSON, and the way back.

The text says what it is: ``schema`` is the record's class, ``schema_version`` grows where a program
that reads the old one would misread the new, ``truenorm`` is the version that wrote it. What is
read is checked against the types of the record's fields: nothing in a text is believed.
"""

from __future__ import annotations

import importlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from truenorm._errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np

R = TypeVar("R")

NOT_DATA = {"data": False}
"""Metadata of a field that holds a live object (a model, an undo): it is left out of JSON."""

SCHEMA_VERSION = 1
"""Of all records: it grows where a field goes or means something else, not where one is added."""


def as_plain(value: Any) -> Any:
    """Plain dicts, lists, strings and numbers; numbers that are not finite become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: as_plain(getattr(value, f.name))
            for f in fields(value)
            if f.metadata.get("data", True)
        }
    if isinstance(value, Mapping):
        return {str(k): as_plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in cast(Sequence[Any], value)]
    as_list = getattr(value, "tolist", None)  # of an array, or a number of NumPy's
    if as_list is not None:
        return as_plain(as_list())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(record: Any) -> str:
    """The record as JSON text."""
    root: Any = importlib.import_module("truenorm")
    head = {
        "schema": f"truenorm.{type(record).__name__}",
        "schema_version": SCHEMA_VERSION,
        "truenorm": root.__version__,
    }
    content = head | as_plain(record)
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def read(kind: type[R], text: str | bytes) -> R:
    """The record that :func:`write` wrote; live objects are not in it."""
    schema = f"truenorm.{kind.__name__}"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_one(schema, "", f"no JSON: {error}") from error
    if not isinstance(content, dict):
        raise _not_one(schema, "", type(content).__name__)
    found = cast(dict[str, Any], content)
    head = found.get("schema"), found.get("schema_version")
    if head != (schema, SCHEMA_VERSION):
        raise _not_one(f"{schema}, version {SCHEMA_VERSION}", "schema", f"{head[0]}, {head[1]}")
    return _made(kind, found, "")


def no_undo() -> None:
    """What stands for the undo of a record that is a copy."""
    raise ModelError(
        "This record is a copy, which cannot undo anything",
        expected="the record that the tool returned, in the process where it ran",
        remedy="call undo() of that one",
    )


def _made(kind: Any, value: Any, where: str) -> Any:
    """A value of this type from what JSON made of it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is Literal:
        return value if value in arguments else _refused(kind, value, where)
    if is_dataclass(kind):
        return _record(cast(type[Any], kind), _checked(dict, value, where), where)
    if origin is tuple:
        parts = enumerate(_checked(list, value, where))
        return tuple(_made(arguments[0], part, f"{where}[{index}]") for index, part in parts)
    if origin is not None and issubclass(origin, Mapping):
        items = _checked(dict, value, where).items()
        return {key: _made(arguments[1], part, _below(where, key)) for key, part in items}
    if origin is not None:
        return _array(_checked(list, value, where), where)
    if kind is float:
        return math.nan if value is None else float(_checked((int, float), value, where))
    return _checked(kind, value, where)


def _array(rows: Any, where: str) -> np.ndarray[Any, Any]:
    import numpy as np  # here, so that a command that only reads a file's text does not wait

    def numbers(part: Any) -> Any:
        if isinstance(part, list):
            return [numbers(one) for one in cast(list[Any], part)]
        return _made(float, part, where)

    try:
        return np.array(numbers(rows), float)
    except ValueError:  # rows of unlike lengths
        return _refused("an array", rows, where)


def _record(kind: type[Any], content: dict[str, Any], where: str) -> Any:
    types_of = _types(kind)
    values: dict[str, Any] = {}
    for one in fields(kind):
        if not one.metadata.get("data", True):
            values[one.name] = no_undo if one.name == "undo" else None
        elif one.name in content:
            values[one.name] = _made(types_of[one.name], content[one.name], _below(where, one.name))
    try:
        return kind(**values)
    except TypeError as error:
        raise _not_one(f"all fields of {kind.__name__}", where, str(error)) from error


@cache
def _types(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _one_of(kinds: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    if type(value) in kinds:
        return value
    for kind in kinds:
        try:
            return _made(kind, value, where)
        except DataError:
            continue
    return _refused(" or ".join(map(_name, kinds)), value, where)


def _checked(kind: Any, value: Any, where: str) -> Any:
    wrong = isinstance(value, bool) and kind is not bool
    if isinstance(value, kind) and not wrong:
        return value
    return _refused("a number" if kind == (int, float) else kind, value, where)


def _refused(kind: Any, value: Any, where: str) -> Any:
    raise _not_one(_name(kind), where, repr(value)[:60])


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", None) or str(kind)


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _not_one(expected: str, where: str, received: str) -> DataError:
    return DataError(
        "This text is not the JSON of such a record",
        where=where or None,
        expected=expected,
        received=received,
        remedy="read what to_json() of the same kind of record wrote",
    )
