"""The model of a study: the user's function, or a ready-made one by its name.

Names: ``package.module:build``; a ``.keras`` file, opened by the safe loader, with initial weights
drawn anew for each seed; ``applications:ResNet50`` and all others of ``keras.applications``,
without weights; and the families ``mlp``, ``cnn`` and ``resnet``, optionally with sizes:
``mlp:64-64``, ``cnn:16-32``, ``resnet:16-32``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from truenorm import archive
from truenorm._errors import DataError, OptionError
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._study.datasets import Parts
from truenorm._study.seeded import seeded

FAMILIES = {"mlp": (64, 64), "cnn": (16, 32), "resnet": (16, 32)}


@dataclass(frozen=True)
class Shape:
    """What a ready-made model must fit.

    Args:
        input: Shape of one sample.
        classes: How many classes there are; None for regression.
    """

    input: tuple[int, ...]
    classes: int | None


@dataclass(frozen=True)
class Named:
    """A model by its name, built for the shape of the data and compiled.

    Args:
        name: See above.
        learning_rate: Adam's.
        activation: Of the families' hidden layers.
        imports: Modules with custom classes that a file needs.
    """

    name: str
    learning_rate: float = 1e-3
    activation: str = "relu"
    imports: tuple[str, ...] = field(default=())

    def __call__(self, shape: Shape) -> Any:
        kind, _, rest = self.name.partition(":")
        if kind in FAMILIES:
            sizes = _sizes(rest) or FAMILIES[kind]
            return self._compiled(_FAMILY[kind](shape, sizes, self.activation), shape)
        if kind == "applications":
            return self._compiled(_application(rest, shape), shape)
        if self.name.endswith(".keras"):
            loaded = archive.load(Path(self.name), imports=self.imports)
            return self._compiled(keras.models.clone_model(loaded), shape)
        raise OptionError(
            "There is no such model",
            where=self.name,
            expected="a .keras file, package.module:function, applications:NAME, or one of "
            f"{', '.join(FAMILIES)}",
        )

    def _compiled(self, model: Any, shape: Shape) -> Any:
        classes = shape.classes is not None
        model.compile(
            keras.optimizers.Adam(self.learning_rate),
            "sparse_categorical_crossentropy" if classes else "mean_squared_error",
            metrics=["accuracy"] if classes else ["mae"],
        )
        return model


def build_of(build: Any, **options: Any) -> Callable[..., Any]:
    """The function behind ``build``: itself, or what its name stands for."""
    if callable(build):
        return build
    if isinstance(build, Path):
        build = str(build)
    if not isinstance(build, str):
        raise OptionError(
            "This does not build a model",
            where="build",
            expected="a function without arguments, or the name of a model",
            received=repr(build),
        )
    module, _, function = build.partition(":")
    if module in FAMILIES or module == "applications" or build.endswith(".keras"):
        if build.endswith(".keras"):
            build = str(Path(build).resolve())
        return Named(build, **options)
    if not function:
        return Named(build, **options)(Shape((1,), None))  # says what names there are
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            "The function cannot be imported",
            where=build,
            expected="package.module:function, importable from here",
            received=str(error),
        ) from error
    return cast(Callable[..., Any], found)


def made(build: Callable[..., Any], parts: Callable[[], Parts], seed: int) -> Any:
    """The model of a seed; the data is looked at only where the model must be fitted to it."""
    shape = shape_of(parts()) if isinstance(build, Named) else None
    arguments = () if shape is None else (shape,)
    return seeded(seed, lambda: build(*arguments))


def shape_of(parts: Parts) -> Shape:
    """What the training data looks like: from arrays, or from its batches."""
    pair = parts.train
    if isinstance(pair, tuple) and all(hasattr(part, "shape") for part in cast(Any, pair)):
        x, y = cast(tuple[Any, Any], pair)
        return Shape(tuple(x.shape[1:]), _classes([np.asarray(y)]))
    labels: list[np.ndarray] = []
    sample: tuple[int, ...] = ()
    for index, batch in enumerate(pair):
        x, y = batch[0], batch[1]
        if not hasattr(x, "shape"):
            raise DataError(
                "A ready-made model takes one input",
                where="data",
                expected="batches (x, y) of arrays",
                received=type(x).__name__,
                remedy="give a function that builds a model for this data",
            )
        sample = tuple(x.shape[1:])
        labels.append(np.asarray(y))
        if index + 1 == parts.steps_per_epoch:
            break
    return Shape(sample, _classes(labels))


def _classes(labels: Sequence[np.ndarray]) -> int | None:
    if not labels or labels[0].dtype.kind == "f":
        return None
    return int(max(part.max() for part in labels)) + 1


def _sizes(text: str) -> tuple[int, ...]:
    if not text:
        return ()
    if not all(part.isdigit() and int(part) > 0 for part in text.split("-")):
        raise OptionError(
            "The sizes of a family are not usable",
            where=text,
            expected="numbers with dashes between them, such as 64-64",
        )
    return tuple(map(int, text.split("-")))


def _application(name: str, shape: Shape) -> Any:
    build = getattr(keras.applications, name, None)
    if not callable(build) or not isinstance(shape.classes, int):
        raise OptionError(
            "keras.applications has no such model" if not callable(build) else "Not for regression",
            where=f"applications:{name}",
            expected="a name such as ResNet50, and data with classes",
        )
    return build(weights=None, input_shape=shape.input, classes=shape.classes)


def _head(x: Any, shape: Shape) -> Any:
    if shape.classes is None:
        return keras.layers.Dense(1, name="value")(x)
    return keras.layers.Dense(shape.classes, activation="softmax", name="class")(x)


def _unit(x: Any, layer: Any, activation: str, name: str) -> Any:
    """A layer, BatchNormalization and the activation, in the order of the original paper."""
    x = BatchNormalization(name=f"{name}_bn")(layer(x))
    return keras.layers.Activation(activation, name=f"{name}_{activation}")(x)


def _mlp(shape: Shape, sizes: Sequence[int], activation: str) -> Any:
    x = source = keras.Input(shape.input)
    if len(shape.input) != 1:
        x = keras.layers.Flatten()(x)
    for i, units in enumerate(sizes, start=1):
        x = _unit(x, keras.layers.Dense(units, name=f"hidden{i}"), activation, f"hidden{i}")
    return keras.Model(source, _head(x, shape), name="mlp")


def _conv(filters: int, rank: int, name: str, strides: int = 1) -> Any:
    kind = keras.layers.Conv1D if rank == 1 else keras.layers.Conv2D
    return kind(filters, 3, strides, padding="same", name=name)


def _image(shape: Shape) -> tuple[Any, int]:
    """The input, with a channel axis, and how many axes a convolution goes over."""
    source = keras.Input(shape.input)
    rank = max(1, min(2, len(shape.input) - 1))
    return source, rank


def _channels(x: Any, shape: Shape) -> Any:
    return keras.layers.Reshape((*shape.input, 1))(x) if len(shape.input) == 1 else x


def _cnn(shape: Shape, sizes: Sequence[int], activation: str) -> Any:
    source, rank = _image(shape)
    x = _channels(source, shape)
    for i, filters in enumerate(sizes, start=1):
        x = _unit(x, _conv(filters, rank, f"conv{i}", 1 + (i > 1)), activation, f"conv{i}")
    return keras.Model(source, _head(_pooled(x, rank), shape), name="cnn")


def _resnet(shape: Shape, sizes: Sequence[int], activation: str) -> Any:
    source, rank = _image(shape)
    x = _channels(source, shape)
    for i, filters in enumerate(sizes, start=1):
        name = "stem" if i == 1 else f"down{i}"
        x = _unit(x, _conv(filters, rank, name, 1 + (i > 1)), activation, name)
        y = _unit(x, _conv(filters, rank, f"block{i}_1"), activation, f"block{i}_1")
        y = _unit(y, _conv(filters, rank, f"block{i}_2"), activation, f"block{i}_2")
        x = keras.layers.Add(name=f"block{i}_add")([x, y])
    return keras.Model(source, _head(_pooled(x, rank), shape), name="resnet")


def _pooled(x: Any, rank: int) -> Any:
    pool = keras.layers.GlobalAveragePooling1D if rank == 1 else keras.layers.GlobalAveragePooling2D
    return pool(name="pool")(x)


_FAMILY: dict[str, Callable[[Shape, Sequence[int], str], Any]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet": _resnet,
}
