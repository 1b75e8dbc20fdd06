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


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_ghost_batches_of_ragged_samples(in_graph: bool, size: int, masked: bool) -> None:
    """Sample i is in ghost batch i mod g, with the values that it has."""
    import tensorflow as tf

    layer: Any = BatchNormalization(momentum=0.0, virtual_batch_size=size)
    layer.build((None, None, 3))
    samples = np.repeat([0, 1, 2, 3], [4, 0, 3, 2])
    valid = np.arange(9) % 4 != 1 if masked else np.ones(9, bool)
    mask = ragged().with_flat_values(valid) if masked else None

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x.flat_values)
            y = layer(x, training=True, mask=mask)
        return y, tape.gradient(y.flat_values, x.flat_values, tf.constant(DY))

    y, d_x = (tf.function(step) if in_graph else step)(ragged())
    assert y.row_lengths().numpy().tolist() == [4, 0, 3, 2]
    groups = 4 // size
    mean, variance = np.zeros(3), np.zeros(3)
    for ghost in range(groups):
        own = samples % groups == ghost
        fallback = (np.zeros(3), np.ones(3))
        true = reference.forward(X[own], mask=valid[own], fallback=fallback)
        slope = reference.backward(DY[own], X[own], mask=valid[own], fallback=fallback).x
        assert error(array(y.flat_values)[own], true.output) < 1e-6
        assert error(array(d_x)[own], slope) < 1e-5  # of two values: they cancel
        share = valid[own].sum() / valid.sum()
        mean, variance = mean + share * true.mean, variance + share * true.variance
    assert error(array(layer.moving_mean), mean) < 1e-6
    assert error(array(layer.moving_variance), variance) < 1e-6


def test_channels_before_the_axis_that_is_ragged() -> None:
    import tensorflow as tf

    lengths = [3, 2, 1, 2, 1, 3]  # of two samples with three channels
    values = np.arange(12, dtype="float32") ** 1.5
    x = tf.RaggedTensor.from_row_lengths(values, lengths)
    x = tf.RaggedTensor.from_uniform_row_length(x, 3)
    layer: Any = BatchNormalization(axis=1, momentum=0.0)
    layer.build((None, 3, None))
    y = array(layer(x, training=True).flat_values)
    channels = np.repeat([0, 1, 2, 0, 1, 2], lengths)
    for channel in range(3):
        own = channels == channel
        assert error(y[own], reference.forward(values[own, None]).output[:, 0]) < 1e-6
        assert array(layer.moving_mean)[channel] == pytest.approx(values[own].mean(), rel=1e-6)


def test_a_dense_mask_of_ragged_samples() -> None:
    import tensorflow as tf

    layer: Any = BatchNormalization(momentum=0.0)
    layer.build((None, None, 3))
    layer(ragged(), training=True, mask=tf.constant([[True, False, True, True]] * 4))
    counted = [0, 2, 3, 4, 6, 7]
    assert error(array(layer.moving_mean), X[counted].mean(0)) < 1e-6


def test_ragged_samples_have_one_domain() -> None:
    layer: Any = BatchNormalization(domains=2, name="bn")
    layer.build((None, None, 3))
    for training in (False, True):
        with pytest.raises(tn.DataError, match="cannot have a domain each"):
            layer(ragged(), training=training, domain=np.array([0, 1, 0, 1]))
    layer(ragged(), training=True, domain=1)
    assert error(array(layer.moving_mean)[1], 0.01 * X.mean(0)) < 1e-6


@pytest.mark.parametrize("option", ["add", "mask"])
def test_what_goes_with_a_ragged_batch_has_rows_of_the_same_lengths(option: str) -> None:
    import tensorflow as tf

    other = tf.RaggedTensor.from_row_lengths(X, [3, 1, 3, 2])
    if option == "mask":
        other = other.with_flat_values(tf.ones(9, tf.bool))
    with pytest.raises((tf.errors.InvalidArgumentError, tn.DataError)):
        BatchNormalization()(ragged(), training=True, **{option: other})


def test_a_dense_addend_of_a_ragged_batch_is_refused() -> None:
    for training in (False, True):
        with pytest.raises(tn.DataError, match="dense beside a ragged input"):
            BatchNormalization()(ragged(), training=training, add=ragged().to_tensor())
