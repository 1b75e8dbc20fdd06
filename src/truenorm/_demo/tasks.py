"""The demo's data sets, which come inside scikit-learn, and a small network for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truenorm._errors import MissingDependencyError

if TYPE_CHECKING:
    import numpy as np

Arrays = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Task:
    """What is learned, by which network, for how long.

    Args:
        describe: The data in a few words.
        network: The network in a few words.
        load: Gives ``((x_train, y_train), (x_validation, y_validation))``.
        build: Gives the compiled network, BatchNormalization before each activation.
        epochs: How often the training set is seen.
        batch_size: Samples per step.
    """

    describe: str
    network: str
    load: Callable[[], tuple[Arrays, Arrays]]
    build: Callable[[], Any]
    epochs: int
    batch_size: int


def digits() -> tuple[Arrays, Arrays]:
    """8x8 pictures of handwritten digits: 1,347 to learn from and 450 to validate on."""
    x, y = _bundled("load_digits")
    return _split((x.reshape(-1, 8, 8, 1) / 16.0).astype("float32"), y)


def breast_cancer() -> tuple[Arrays, Arrays]:
    """30 measurements of cell nuclei, standardised: 426 to learn from and 143 to validate on."""
    x, y = _bundled("load_breast_cancer")
    (x_train, y_train), (x_val, y_val) = _split(x, y)
    mean, deviation = x_train.mean(axis=0), x_train.std(axis=0)
    scaled = [((part - mean) / deviation).astype("float32") for part in (x_train, x_val)]
    return (scaled[0], y_train), (scaled[1], y_val)


def residual_network() -> Any:
    """A residual convolutional network for the digits: six BatchNormalization layers."""
    import keras

    from truenorm._layer.batch_normalization import BatchNormalization

    def unit(x: Any, filters: int, name: str, strides: int = 1) -> Any:
        x = keras.layers.Conv2D(filters, 3, strides, padding="same", name=f"{name}_conv")(x)
        x = BatchNormalization(name=f"{name}_bn")(x)
        return keras.layers.ReLU(name=f"{name}_relu")(x)

    def block(x: Any, filters: int, name: str) -> Any:
        return keras.layers.Add(name=f"{name}_add")(
            [x, unit(unit(x, filters, f"{name}_1"), filters, f"{name}_2")]
        )

    inputs = keras.Input((8, 8, 1), name="pixels")
    x = block(unit(inputs, 16, "stem"), 16, "block1")
    x = block(unit(x, 32, "down", strides=2), 32, "block2")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = keras.layers.Dense(10, activation="softmax", name="digit")(x)
    return _compiled(keras.Model(inputs, outputs, name="digits"))


def dense_network() -> Any:
    """A dense network for the measurements: three BatchNormalization layers."""
    import keras

    from truenorm._layer.batch_normalization import BatchNormalization

    inputs = x = keras.Input((30,), name="measurements")
    for index, units in enumerate((64, 64, 32), start=1):
        x = keras.layers.Dense(units, name=f"hidden{index}")(x)
        x = BatchNormalization(name=f"hidden{index}_bn")(x)
        x = keras.layers.ReLU(name=f"hidden{index}_relu")(x)
    outputs = keras.layers.Dense(2, activation="softmax", name="diagnosis")(x)
    return _compiled(keras.Model(inputs, outputs, name="breast_cancer"))


TASKS = {
    "digits": Task(
        "8x8 pictures of handwritten digits (scikit-learn): 1,347 for training, 450 for validation",
        "a small residual convolutional network",
        digits,
        residual_network,
        epochs=12,
        batch_size=32,
    ),
    "breast_cancer": Task(
        "30 measurements of cell nuclei (scikit-learn): 426 for training, 143 for validation",
        "a dense network with three hidden layers",
        breast_cancer,
        dense_network,
        epochs=20,
        batch_size=32,
    ),
}


def _bundled(name: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "The demo's data comes inside scikit-learn, which is not installed",
            remedy='pip install "truenorm[demo]"',
        ) from error
    return getattr(datasets, name)(return_X_y=True)


def _split(x: Any, y: Any) -> tuple[Arrays, Arrays]:
    from sklearn.model_selection import train_test_split

    parts: Any = train_test_split(x, y.astype("int32"), test_size=0.25, random_state=0, stratify=y)
    x_train, x_val, y_train, y_val = parts
    return (x_train, y_train), (x_val, y_val)


def _compiled(model: Any) -> Any:
    import keras

    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model
