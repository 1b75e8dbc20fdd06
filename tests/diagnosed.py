"""Models with a fault made by hand, and the finding of it."""

from __future__ import annotations

from typing import Any

import keras

import truenorm as tn

L = keras.layers


def set_statistics(layer: Any, mean: Any, variance: Any) -> None:
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(variance)


def only(diagnosis: tn.Diagnosis) -> tn.Finding:
    (finding,) = diagnosis.findings
    return finding


# --- statistics --------------------------------------------------------------------------------


def functional(*layers: Any, shape: tuple[int, ...] = (6, 6, 3)) -> Any:
    inputs = x = keras.Input(shape)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x, name="model")


def conv(name: str | None = None, **options: Any) -> Any:
    return L.Conv2D(4, 3, padding="same", name=name, **options)


def dropped(rate: float = 0.5, *, late: bool = False, depth: bool = False) -> Any:
    dropout = L.Dropout(rate, noise_shape=(None, 1, 1, 1) if depth else None, name="drop")
    chain = [conv(), L.BatchNormalization(name="bn"), L.ReLU()]
    layers = [*chain, dropout] if late else [dropout, *chain]
    return functional(*layers, L.Flatten(), L.Dense(1))
