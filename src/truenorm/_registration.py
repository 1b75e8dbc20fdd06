"""Registers the layers with Keras as soon as both are imported, in whichever order.

A saved model names its layers, and Keras makes only those that it knows. Importing Keras here would
make ``import truenorm`` slow, so its import is awaited; where it fails for want of a backend, what
to install is said.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from truenorm._backends import Backend
from truenorm._errors import MissingDependencyError


def register_layer() -> None:
    """Register now if Keras is imported, else right after its import."""
    if "keras" in sys.modules:
        for module in ("batch_normalization", "frozen_affine"):
            importlib.import_module(f"truenorm._layer.{module}")
    elif not any(isinstance(finder, _KerasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _KerasFinder())


class _KerasFinder(MetaPathFinder):
    """Finds Keras where the other finders do, and has the layer registered once it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "keras":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader)
        return spec


def _call_after(loader: Loader) -> None:
    """Have the layer registered when this loader has run Keras; an import that fails may recur."""
    run: Any = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        try:
            run(module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name not in list(Backend):
                raise
            raise _missing(error.name) from error
        register_layer()

    loader.exec_module = exec_module


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
