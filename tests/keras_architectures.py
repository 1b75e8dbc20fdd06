"""The architectures of ``keras.applications``, small and with values as after a training."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import keras
import numpy as np
from small_models import predict, shake


@dataclass(frozen=True)
class Family:
    """What is known of an architecture from its own definition in ``keras.applications``.

    Args:
        size: Height and width of its images: the least that Keras takes, or that still trains.
        sites: How many BatchNormalization it has.
        left: How many of them cannot be folded, by the reason.
        cheap: Whether its tests take a few seconds on every backend.
    """

    size: int
    sites: int
    left: dict[str, int] = field(default_factory=dict[str, int])
    cheap: bool = False


FAMILIES = {
    "ConvNeXtTiny": Family(32, 0),
    # Pre-activation: a BatchNormalization and its activation read what is also passed on as it is,
    # to be concatenated with what comes later. Only the one between two convolutions folds.
    "DenseNet121": Family(32, 121, {"has other consumers too; its output goes to Activation": 62}),
    "EfficientNetB0": Family(32, 49),
    "EfficientNetV2B0": Family(32, 59),
    "InceptionResNetV2": Family(75, 204),
    "InceptionV3": Family(75, 94),
    "MobileNet": Family(32, 27),
    "MobileNetV2": Family(32, 52, cheap=True),
    "MobileNetV3Small": Family(32, 34),
    "NASNetMobile": Family(32, 192),
    "ResNet50": Family(64, 53),
    # Pre-activation too: what is read is also added later. The first one reads the padded images.
    "ResNet50V2": Family(
        32,
        49,
        {
            "has other consumers too; its output goes to Activation": 16,
            "comes from ZeroPadding2D pool1_pad; its output goes to Activation": 1,
        },
    ),
    "VGG16": Family(32, 0, cheap=True),
    "VGG19": Family(32, 0),
    "Xception": Family(71, 40),
}


@contextmanager
def quick_initial_values() -> Generator[None]:
    """NumPy draws the initial kernels: JAX compiles a program for every shape that it draws."""
    generator = np.random.default_rng(0)

    def draw(_: Any, shape: Any, dtype: Any = None) -> Any:
        spread = np.sqrt(2 / max(1, np.prod(shape[:-1])))
        values = generator.normal(scale=spread, size=shape)
        return keras.ops.convert_to_tensor(values, dtype=dtype or keras.config.floatx())

    with patch.object(keras.initializers.VarianceScaling, "__call__", draw):
        yield


@cache
def images_for(name: str) -> np.ndarray:
    """A batch in the range of photographs, the same for all tests: shapes cost time on JAX."""
    shape = (8, FAMILIES[name].size, FAMILIES[name].size, 3)
    return np.random.default_rng(0).normal(128, 64, size=shape).astype("float32")


@cache
def model_of(name: str) -> Any:
    """One model for all tests of a process: the tools must not change it."""
    size = FAMILIES[name].size
    build = getattr(keras.applications, name)
    with quick_initial_values():
        model = build(weights=None, input_shape=(size, size, 3), include_top=False, pooling="avg")
    _settle(shake(model, spread=0.25), images_for(name))
    return model


@cache
def outputs_of(name: str) -> np.ndarray:
    """What the original model makes of its images: the oracle."""
    outputs = predict(model_of(name), images_for(name))[0]
    assert np.isfinite(outputs).all()
    assert contrast(outputs) > 0.01 * np.abs(outputs).max()  # else nothing would be compared
    return outputs


def contrast(outputs: np.ndarray) -> float:
    """How much the outputs for the images differ from one image to the other."""
    return float(np.abs(outputs - outputs.mean(axis=0)).max())


def error(model: Any, name: str) -> float:
    """Largest difference from the original's outputs, relative to what the images make of them."""
    expected = outputs_of(name)
    return float(np.abs(predict(model, images_for(name))[0] - expected).max()) / contrast(expected)


def _settle(model: Any, x: np.ndarray) -> None:
    """Statistics that fit the data, or no output of so deep a model would depend on the image.

    The variances are a bit too large and nearly the same in all channels of a layer, so that a
    channel without signal does not amplify rounding.
    """
    generator = np.random.default_rng(1)
    layers: list[Any] = [k for k in model.layers if isinstance(k, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    if layers:
        model(x, training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        variance = layer.moving_variance.numpy()
        factors = 1.2 * 2 ** generator.uniform(-0.25, 0.25, variance.shape)
        layer.moving_variance.assign(variance.mean() * factors)
