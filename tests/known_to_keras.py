"""What Keras can make from a configuration, as Keras itself lists it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import keras
from keras.src.ops.operation import Operation

from truenorm.archive._classes import AREAS


def found() -> set[str]:
    """Every public class and function of the parts that a file may name, and every operation."""
    names = {
        f"keras.{area}.{name}"
        for area in AREAS - {"dtype"}
        for name, value in vars(getattr(keras, area)).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }
    source = importlib.import_module("keras.src.ops")
    for module in pkgutil.iter_modules(source.__path__, "keras.src.ops."):
        if not module.name.endswith("_test"):
            importlib.import_module(module.name)
    operations = {
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in _below(Operation)
        if kind.__module__.startswith("keras.src.") and not issubclass(kind, keras.layers.Layer)
    }
    return names | {name for name in operations if "<locals>" not in name}


def _below(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)
