"""Registers the layers with Keras as soon as both are imported, in whichever order.

A saved model names its layers, and Keras makes only those that it knows. Importing Keras here would
make ``import truenorm`` slow, so its import is awaited.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


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
        run(module)
        register_layer()

    loader.exec_module = exec_module
