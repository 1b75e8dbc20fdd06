"""Another normalisation in the place of BatchNormalization: with batches of two it matters.

``python examples/conversion.py`` trains a small convolutional network on scikit-learn's handwritten
digits with two images per batch: with BatchNormalization, with GroupNormalization and
LayerNormalization in its place, and with a frozen scale and shift made of the statistics of a
network that was trained before. Each is one line, and ``tn.study`` takes them as variants.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import truenorm as tn

CONVERSIONS = {
    "batch": lambda model: model,
    "renorm": lambda model: tn.replace(model, renorm=True).model,
    "group": lambda model: tn.replace(model, to="group", groups=4).model,
    "layer": lambda model: tn.replace(model, to="layer").model,
}


def network() -> Any:
    """Two convolutions with BatchNormalization."""
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for filters in (8, 16):
        model.add(keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main() -> None:
    """Train each; then freeze a trained one."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:600], order[1297:]

    def accuracy(model: Any) -> float:
        return model.evaluate(x[test], y[test], verbose=0, return_dict=True)["accuracy"]

    for name, convert in CONVERSIONS.items():
        keras.utils.set_random_seed(0)
        model = convert(network())
        model.fit(x[train], y[train], epochs=1, batch_size=2, verbose=0)
        print(f"{name:8} {accuracy(model):.3f}")
    frozen = tn.replace(model := _trained(x[train], y[train]), to="affine")
    print(frozen)
    print(f"trained  {accuracy(model):.3f}, as a frozen map {accuracy(frozen.model):.3f}")


def _trained(x: Any, y: Any) -> Any:
    model = network()
    model.fit(x, y, epochs=2, batch_size=32, verbose=0)
    tn.recalibrate(model, x)
    return model


if __name__ == "__main__":
    main()
