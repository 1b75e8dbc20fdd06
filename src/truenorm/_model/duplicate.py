"""A copy of a layer made of its attributes, where its constructor cannot make one.

Every variable gets a new one with the same value and state, every layer inside its counterpart,
and what leads to them (lists, helper objects, bound methods, closures) is made again around the
new ones. All else is shared.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, cast

import keras

from truenorm._errors import ModelError
from truenorm._keras_internals import attributes, blank_like, constructed_like, finish_like
from truenorm._model.state import variable_like

_NOT_TAKEN_APART = sys.stdlib_module_names | {"jax", "jaxlib", "keras", "tensorflow", "torch"}
"""Packages whose objects cannot hold a layer of the user's."""


class Duplicator:
    """Copies of layers; one object is the same one in all of them.

    Args:
        counterpart: What stands for a layer inside.
    """

    def __init__(self, counterpart: Callable[[Any], Any]) -> None:
        self._counterpart = counterpart
        self._made: dict[int, tuple[Any, Any]] = {}  # with the originals: no id comes twice
        self.layers: list[tuple[Any, Any]] = []
        self.variables: list[tuple[Any, Any]] = []

    def layer(self, old: Any) -> Any:
        """A layer, or a model that is not a graph, like this one."""
        new = self._note(old, blank_like(old))
        self.layers.append((old, new))
        constructed_like(old, new, self.value)
        self.fill(old, new)
        finish_like(old, new, self.value)
        return new

    def fill(self, old: Any, new: Any) -> None:
        """Give a layer or model the attributes that it lacks."""
        for name, value in attributes(old, new).items():
            setattr(new, name, self.value(value))

    def value(self, old: Any) -> Any:
        """What stands for a value: the value itself if nothing in it has a counterpart."""
        if id(old) not in self._made:
            self._note(old, old)  # for what leads back to itself
            self._note(old, self._copied(old))
        return self._made[id(old)][1]

    def _copied(self, old: Any) -> Any:
        if isinstance(old, keras.Layer):
            return self._counterpart(old)
        if isinstance(old, keras.Variable):
            self.variables.append((old, variable_like(old)))
            return self.variables[-1][1]
        if isinstance(old, keras.Optimizer | keras.Metric):  # they start anew
            return type(old).from_config(old.get_config())
        if isinstance(old, list | tuple | dict | set):
            return self._container(cast(Any, old))
        if isinstance(old, types.FunctionType):
            return self._closure(old)
        if isinstance(old, types.MethodType):
            owner = self.value(old.__self__)
            return old if owner is old.__self__ else types.MethodType(old.__func__, owner)
        if isinstance(old, functools.partial):
            parts = self._values((old.func, old.args, old.keywords))
            return old if parts is None else functools.partial(parts[0], *parts[1], **parts[2])
        if hasattr(old, "__array__") and not isinstance(old, keras.KerasTensor):
            return _array_like(old)
        return self._object(old)

    def _note(self, old: Any, new: Any) -> Any:
        self._made[id(old)] = old, new
        return new

    def _values(self, old: Iterable[Any]) -> list[Any] | None:
        """What stands for several values; None if each is itself."""
        old = list(old)
        new = [self.value(one) for one in old]
        return None if all(a is b for a, b in zip(old, new, strict=True)) else new

    def _container(self, old: Any) -> Any:
        """Those that Keras tracks become so again once they are attributes."""
        if isinstance(old, dict):
            values = self._values(cast(Any, old).values())
            kind = OrderedDict if isinstance(old, OrderedDict) else dict
            return old if values is None else kind(zip(cast(Any, old), values, strict=True))
        values = self._values(old)
        kind: Any = next(kind for kind in (list, tuple, set) if isinstance(old, kind))
        make = getattr(old, "_make", kind)  # of a named tuple
        return old if values is None else make(values)

    def _closure(self, old: types.FunctionType) -> Any:
        """The same code over the new values."""
        cells = [cell for cell in old.__closure__ or () if _is_filled(cell)]
        given = (old.__defaults__, old.__kwdefaults__)
        values = self._values([*given, *(cell.cell_contents for cell in cells)])
        if values is None:
            return old
        contents = dict(zip(map(id, cells), values[2:], strict=True))
        closure = tuple(
            types.CellType(contents[id(cell)]) if id(cell) in contents else cell
            for cell in old.__closure__ or ()
        )
        new = types.FunctionType(
            old.__code__, old.__globals__, old.__name__, values[0], closure or None
        )
        new.__kwdefaults__, new.__qualname__ = values[1], old.__qualname__
        new.__dict__.update(vars(old))
        return new

    def _object(self, old: Any) -> Any:
        """A helper object, if it holds anything that has a counterpart."""
        package = type(old).__module__.partition(".")[0]
        known = isinstance(old, keras.random.SeedGenerator | types.SimpleNamespace)
        if (package in _NOT_TAKEN_APART and not known) or not hasattr(old, "__dict__"):
            self._require_free(old)
            return old
        try:
            new = self._note(old, copy.copy(old))
        except Exception:  # it is not known what the user's class does when it is copied
            return old
        values = self._values(vars(old).values())
        if values is None:
            return old
        vars(new).update(zip(vars(old), values, strict=True))
        return new

    def _require_free(self, old: Any) -> None:
        """Refuse a compiled function that goes on computing with the old layer."""
        inside = getattr(old, "__wrapped__", getattr(old, "python_function", None))
        if callable(inside) and self.value(inside) is not inside:
            raise ModelError(
                "A layer holds a compiled function that computes with its own variables, and this "
                "cannot be copied",
                where=getattr(inside, "__qualname__", repr(inside)),
                remedy="make the function in build(), and give the class a get_config()",
            )


def _array_like(old: Any) -> Any:
    try:
        return copy.deepcopy(old)
    except Exception:  # a result that PyTorch follows back to its variables, for one
        return old


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - it raises where the name has no value yet
    except ValueError:
        return False
    return True
