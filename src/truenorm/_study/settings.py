"""What decides a study's result beside its arguments, and the hashes that tell studies apart."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from typing import Any, cast

import keras
import numpy as np

from truenorm._study.folder import Arrays


def context(model: Any, arrays: tuple[Arrays, Arrays], backend: str) -> dict[str, Any]:
    """The model and the data as hashes, the backend of the trials, Keras's settings, versions."""
    return {
        "backend": backend,
        "built_on": keras.config.backend(),
        "versions": _versions(backend),
        "floatx": keras.config.floatx(),
        "dtype_policy": keras.config.dtype_policy().name,
        "data": digest([array for pair in arrays for array in pair]),
        "model": digest(_nameless(keras.saving.serialize_keras_object(model))),
    }


def digest(content: Any) -> str:
    """SHA-256 of arrays (type, shape, bytes) or of anything that JSON can say."""
    made = hashlib.sha256()
    if isinstance(content, list):
        for array in cast(list[np.ndarray], content):
            made.update(f"{array.dtype.str}{array.shape}".encode())
            made.update(np.ascontiguousarray(array).data)
    else:
        made.update(json.dumps(content, sort_keys=True, default=str).encode())
    return made.hexdigest()


def _versions(backend: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("truenorm", "keras", "numpy", backend):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # such as tensorflow-cpu
            found[package] = "unknown"
    return found


def _nameless(config: Any) -> Any:
    """A model's config with every object's name replaced by its number.

    Keras counts on in the names that it gives (``dense``, ``dense_1``), so the second model that
    ``build`` makes in a process has other names than the first, and is still the same.
    """
    numbers = {name: f"#{i}" for i, name in enumerate(dict.fromkeys(_names(config)))}

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: renamed(v) for k, v in cast(dict[str, Any], value).items()}
        if isinstance(value, list | tuple):
            return [renamed(item) for item in cast(Sequence[Any], value)]
        return numbers.get(value, value) if isinstance(value, str) else value

    return renamed(config)


def _names(value: Any) -> Iterator[str]:
    """The names of the objects in a config; a dtype policy's name is its value and stays."""
    if isinstance(value, dict):
        content = cast(dict[str, Any], value)
        inner = content.get("config")
        if isinstance(inner, dict) and not str(content.get("class_name")).endswith("Policy"):
            own = cast(dict[str, Any], inner).get("name")
            if isinstance(own, str):
                yield own
    for item in _items(value):
        yield from _names(item)


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return tuple(cast(dict[str, Any], value).values())
    return tuple(cast(Sequence[Any], value)) if isinstance(value, list | tuple) else ()
