"""A model with what replace(fuse=True) takes in, and how it is compared with another."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import truenorm as tn

L = keras.layers


def projected() -> Any:
    """A block whose shortcut has a BatchNormalization, too, and one that adds its input."""
    inputs = keras.Input((6, 6, 3), name="image")
    x = L.Conv2D(4, 3, padding="same", name="conv")(inputs)
    x = L.Activation("relu", name="relu")(L.BatchNormalization(name="bn")(x))
    shortcut = L.BatchNormalization(name="0_bn")(L.Conv2D(5, 1, name="0_conv")(x))
    y = L.BatchNormalization(name="3_bn")(L.Conv2D(5, 3, padding="same", name="3_conv")(x))
    x = L.ReLU(name="out")(L.Add(name="sum")([shortcut, y]))
    y = L.BatchNormalization(name="b_bn")(L.Conv2D(5, 3, padding="same", name="b_conv")(x))
    x = keras.activations.relu(y + x)
    return keras.Model(inputs, L.Dense(2, name="head")(L.GlobalAveragePooling2D()(x)), name="net")


def receipt(rewrite: tn.Rewrite) -> dict[str, str]:
    changed = {change.path: change.what for change in rewrite.changed}
    return changed | {left.path: left.reason for left in rewrite.left}


def steps(model: Any, x: Any, batches: int = 3) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of some steps, and all weights after them, by name."""
    model.compile(keras.optimizers.SGD(0.05), "mse")
    y = np.random.default_rng(1).normal(size=(len(x), *model.output_shape[1:])).astype("float32")
    losses = [float(model.train_on_batch(x, y)) for _ in range(batches)]
    weights = {
        f"{layer.name}/{weight.name}": np.array(keras.ops.convert_to_numpy(weight))
        for layer in model._flatten_layers()
        if not isinstance(layer, keras.Model)
        for weight in layer.weights
    }
    return losses, weights


def check_training(old: Any, new: Any, x: Any, tolerance: float = 1e-4) -> None:
    """Steps of both give the same losses, and the same weights."""
    (losses, weights), (own_losses, own_weights) = steps(old, x), steps(new, x)
    np.testing.assert_allclose(own_losses, losses, rtol=tolerance)
    assert own_weights.keys() == weights.keys()
    for name, values in weights.items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(own_weights[name], values, atol=tolerance * scale, err_msg=name)
