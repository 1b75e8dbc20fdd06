"""A backward pass that comes after other calls of the layer has the numbers of its own call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, error, tensor

from truenorm import BatchNormalization
from truenorm._kernels import reference

RNG = np.random.default_rng(9)
X, NEXT, UPSTREAM = (RNG.normal(0.5, 2, (16, 4)) for _ in range(3))


def forward(function: Callable[[Any], Any], x: Any, upstream: Any) -> Callable[[], Any]:
    """Computes the function now; what is returned computes the gradient of x."""
    if keras.config.backend() == "jax":
        import jax

        _, pull = jax.vjp(function, x)
        return lambda: pull(upstream)[0]
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            output = function(x)
        return lambda: tape.gradient(output, x, upstream)
    import torch

    x = x.requires_grad_()
    output = function(x)
    return lambda: torch.autograd.grad(output, x, upstream)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": False, "center": False},
        {"freeze": "affine"},
        {"freeze": "statistics"},
        {"renorm": True},
        {"activation": "relu", "freeze": "affine"},
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [False, True])
def test_inference_then_training_then_backward(options: dict[str, Any], frozen: bool) -> None:
    """As it is, or frozen for the first call; gamma changes before the backward pass, too."""
    layer = BatchNormalization(momentum=0.5, gamma_initializer="ones", **options)
    layer.build(X.shape)
    mean, variance = np.full(4, 0.25), np.full(4, 3.0)
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(variance)
    policy = layer.freeze
    if frozen:
        layer.freeze = "all"

    gradient = forward(lambda x: layer(x, training=frozen), tensor(X), tensor(UPSTREAM))
    layer.freeze = "none" if frozen else policy
    layer(tensor(NEXT), training=True)
    if layer.gamma is not None and frozen:
        layer.gamma.assign(3.0 * np.ones(4))
    assert frozen is False or (array(layer.moving_mean) != mean).all()

    expected = UPSTREAM / np.sqrt(variance + 1e-3)
    if layer.activation is not None:
        expected = expected * (reference.infer(X, mean, variance) > 0)
    assert error(array(gradient()), expected) < 1e-6


@pytest.mark.parametrize(
    "options", [{"scale": False}, {"renorm": True, "scale": False}, {"freeze": "affine"}], ids=str
)
def test_training_then_training_then_backward(options: dict[str, Any]) -> None:
    """Beta, as of the stock layer, may be changed by an optimizer in between."""
    layer = BatchNormalization(momentum=0.5, **options)
    layer.build(X.shape)
    gradient = forward(lambda x: layer(x, training=True), tensor(X), tensor(UPSTREAM))
    layer(tensor(NEXT), training=True)
    if layer.beta is not None:
        layer.beta.assign(np.ones(4))
    expected = reference.backward(UPSTREAM, X).x
    if layer.renorm:
        # r is the batch's deviation over the moving one of before, which is 1.
        expected = expected * np.sqrt(X.var(0) + 1e-3)
    assert error(array(gradient()), expected) < 1e-5
