"""What a study was asked to do, as settings that can be compared, and the trials that it needs.

A folder keeps the settings of its study, so that another study is told from it: functions, models
and data stand there as hashes.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import keras

from truenorm._study.datasets import Parts, Ready
from truenorm._study.folder import Spec, digest
from truenorm._study.identity import code_digest
from truenorm._study.variants import Variant


def specs_of(settings: Mapping[str, Any], *, keep_models: bool) -> list[Spec]:
    """Every trial, seed by seed: what stops a study early leaves whole pairs."""
    own = ("positions", "variants", "seeds", "margin", "threshold")
    shared = {key: value for key, value in settings.items() if key not in own}
    variants = settings.get("variants", {})
    return [
        Spec(
            identity=digest([shared, position, variants.get(position), seed]),
            position=position,
            seed=seed,
            epochs=settings["epochs"],
            batch_size=settings["batch_size"],
            recalibrate=settings["recalibrate"],
            keep_model=keep_models,
            costs=seed == settings["seeds"][0],
            floatx=settings["floatx"],
            dtype_policy=settings["dtype_policy"],
        )
        for seed in settings["seeds"]
        for position in settings["positions"]
    ]


def code_of_variants(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Settings and code of every variant."""
    return {
        name: {
            **variant.settings(),
            **({"code": code_digest(variant.change)} if callable(variant.change) else {}),
        }
        for name, variant in variants.items()
    }


def data_digest(arrays: Parts | None, function: Callable[..., Any] | None) -> str:
    """A hash of the arrays, or of the code of the function that gives the data."""
    if isinstance(function, Ready):
        return function.identity()
    if arrays is None:
        return code_digest(function)
    pairs = [pair for pair in (arrays.train, arrays.validation, arrays.test) if pair is not None]
    return digest([array for pair in pairs for array in pair])


def model_digest(model: Any) -> str:
    """A hash of a model's configuration and compilation, whatever its layers are called."""
    try:
        config = keras.saving.serialize_keras_object(model)
    except (TypeError, ValueError, NotImplementedError, AttributeError):
        config = {"class": code_digest(type(model))}  # a class that does not say its config
    return digest(_nameless(config))


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


def versions_with(backend: str) -> dict[str, str]:
    """The versions of what trains with this backend."""
    found = {"python": platform.python_version()}
    for package in ("truenorm", "keras", "numpy", backend):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # such as tensorflow-cpu
            found[package] = "unknown"
    return found
