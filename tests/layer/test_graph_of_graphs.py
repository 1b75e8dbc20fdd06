"""TensorFlow: the gradient of a gradient, with the call, the tapes or both inside a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array

from truenorm import BatchNormalization
from truenorm._kernels import reference

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="TensorFlow's")
RNG = np.random.default_rng(3)
X, DY, TOWARD = (RNG.normal(2, 1, (6, 3)) for _ in range(3))
GAMMA = np.array([1.5, 0.7, 2.0])


def penalty(x: np.ndarray[Any, Any]) -> float:
    """The squared norm of the gradient of sum(y DY)."""
    return float(np.square(reference.backward(DY, x, GAMMA, epsilon=1e-3).x).sum())


SLOPE = (penalty(X + 1e-5 * TOWARD) - penalty(X - 1e-5 * TOWARD)) / 2e-5


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def graph(function: Callable[..., Any]) -> Callable[..., Any]:
    import tensorflow as tf

    return tf.function(function)


def by_xla(function: Callable[..., Any]) -> Callable[..., Any]:
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("inner", "outer"),
    [(plain, graph), (graph, plain), (graph, graph), (plain, by_xla), (by_xla, plain)],
)
def test_a_gradient_penalty(inner: Any, outer: Any, masked: bool) -> None:
    """As that of WGAN-GP, whose critic is often a graph of its own."""
    import tensorflow as tf

    layer: Any = BatchNormalization(dtype="float64")
    layer.build((None, 3))
    layer.gamma.assign(GAMMA)
    mask = tf.ones(len(X), "bool") if masked else None
    call = inner(lambda x: layer(x, training=True, mask=mask))

    def slope(x: Any) -> Any:
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                loss = tf.reduce_sum(call(x) * DY)
            norm = tf.reduce_sum(first.gradient(loss, x) ** 2)
        return second.gradient(norm, x)

    found = array(outer(slope)(tf.constant(X)))
    assert float((found * TOWARD).sum()) == pytest.approx(SLOPE, rel=1e-6)
