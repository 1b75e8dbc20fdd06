"""Ragged inputs, and channels whose number the input's shape does not say: both TensorFlow's."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, error

import truenorm as tn
from truenorm import BatchNormalization
from truenorm._kernels import reference

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="TensorFlow's")
RNG = np.random.default_rng(5)
X = RNG.normal(3, 2, (9, 3)).astype("float32")
DY = RNG.normal(size=X.shape).astype("float32")


def ragged() -> Any:
    import tensorflow as tf

    return tf.RaggedTensor.from_row_lengths(X, [4, 0, 3, 2])


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_ragged_batch(in_graph: bool) -> None:
    import tensorflow as tf

    layer: Any = BatchNormalization(momentum=0.0)
    layer.build((None, None, 3))

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x.flat_values)
            y = layer(x, training=True)
        return y, tape.gradient(y.flat_values, x.flat_values, tf.constant(DY))

    y, d_x = (tf.function(step) if in_graph else step)(ragged())
    true = reference.forward(X)
    assert y.row_lengths().numpy().tolist() == [4, 0, 3, 2]
    assert error(array(y.flat_values), true.output) < 1e-6
    assert error(array(d_x), reference.backward(DY, X).x) < 1e-6
    assert error(array(layer.moving_variance), true.variance) < 1e-6
    inferred = layer(ragged()).flat_values
    np.testing.assert_allclose(
        inferred, (X - true.mean) / np.sqrt(true.variance + 1e-3), rtol=1e-4, atol=1e-5
    )


def test_a_model_of_ragged_batches() -> None:
    inputs = keras.Input((None, 3))
    layer: Any = BatchNormalization(momentum=0.5)
    outputs = keras.layers.GlobalAveragePooling1D()(layer(inputs))
    model: Any = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x = ragged()[0:3:2]
    model.fit(x, np.zeros((2, 3)), verbose=0)
    assert error(array(layer.moving_mean), x.flat_values.numpy().mean(0) / 2) < 1e-6
    assert model.predict(x, verbose=0).shape == (2, 3)


@pytest.mark.parametrize("axis", [-1, 1])
def test_channels_that_only_run_time_knows(axis: int) -> None:
    import tensorflow as tf

    layer: Any = BatchNormalization(axis=axis, momentum=0.0, scale=False, center=False)
    layer.build((None, 3, 3))
    x = RNG.normal(3, 2, (9, 3, 3)).astype("float32")
    spec = tf.TensorSpec((None, None, None), tf.float32)

    @tf.function(input_signature=[spec])
    def call(x: Any) -> Any:
        return layer(x, training=True)

    true = reference.forward(x, axis=axis)
    assert error(array(call(x)), true.output) < 1e-6
    assert error(array(layer.moving_mean), true.mean) < 1e-6


@pytest.mark.parametrize("tool", [tn.collect, tn.recalibrate])
def test_the_statistics_of_ragged_data(tool: Any) -> None:
    """Of the values that are there, wherever the batches are cut."""
    layer: Any = BatchNormalization(name="bn")
    model: Any = keras.Sequential([keras.Input((None, 3)), layer])
    tool(model, ragged(), batch_size=3)
    population = tn.collect(model, [ragged()[:3], ragged()[3:]], max_samples=4)
    moments = population.sites["bn"]
    assert (population.samples, population.batches) == (4, 2)
    assert error(moments.mean, X.astype(float).mean(0)) < 1e-12
    assert error(moments.variance, X.astype(float).var(0)) < 1e-12
    if tool is tn.recalibrate:
        assert error(array(layer.moving_mean), X.astype(float).mean(0)) < 1e-6
