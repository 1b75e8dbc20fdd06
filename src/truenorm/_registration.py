"""Registers the layers with Keras as soon as both are imported, in whichever order.

A saved model names its layers, and Keras makes only those that it knows. Importing Keras here would
make ``import truenorm`` slow, so its import is awaited; where it fails for want of a backend, what
to install is said.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from threading import Lock
from types import ModuleType
from typing import Any

from truenorm._backends import Backend
from truenorm._errors import MissingDependencyError


def register_layer() -> None:
    """Register now if Keras is imported, else after its import."""
    if "keras" in sys.modules:
        for module in ("batch_normalization", "frozen_affine"):
            importlib.import_module(f"truenorm._layer.{module}")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds modules where the other finders do, and sees Keras's import and truenorm's own.

    The layer is registered once Keras is imported, and not while a module of truenorm is: that
    module may be what imports Keras, and what the layer needs.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._open = 0
        self._due = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "keras" and not fullname.startswith("truenorm."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            around = self._keras if fullname == "keras" else self._own
            loader.exec_module = partial(around, loader.exec_module)
        return spec

    def _keras(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Run Keras; an import that fails may be tried again."""
        try:
            run(module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name not in list(Backend):
                raise
            raise _missing(error.name) from error
        self._due = True
        self._register()

    def _own(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Run a module of truenorm."""
        with self._lock:
            self._open += 1
        try:
            run(module)
        finally:
            with self._lock:
                self._open -= 1
            self._register()

    def _register(self) -> None:
        if self._due and not self._open:
            self._due = False
            register_layer()


def _missing(backend: str) -> MissingDependencyError:
    """Keras wants a backend that is not there; it takes TensorFlow where nobody chose one."""
    installed = [name for name in Backend if importlib.util.find_spec(name) is not None]
    if installed:
        remedy = f"set KERAS_BACKEND={installed[0]} before Keras is imported"
    else:
        remedy = 'pip install "truenorm[jax]", or [tensorflow], or [torch]; then set KERAS_BACKEND'
    return MissingDependencyError(
        f"Keras is to work on {backend}, which is not installed",
        where="KERAS_BACKEND",
        expected=", ".join(installed or Backend),
        received=backend,
        remedy=remedy,
    )
