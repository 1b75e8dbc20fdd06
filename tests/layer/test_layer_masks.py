"""Masks mean what they mean in Keras, whichever axis holds the channels."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import Drawn, array, error, precision, tensor, train

import truenorm as tn
from truenorm import BatchNormalization, DataError
from truenorm._kernels import reference, sums

RNG = np.random.default_rng(8)
X = np.float64(RNG.normal(3, 2, (4, 3, 5)).astype("float32"))
"""Samples, channels, time: ``axis=1``."""
# Per sample and channel: the first channel has 15 values, the second 5, the third none.
MASK = np.array([[True, False, False], [True, True, False], [True, False, False], [False] * 3])


def called(layer: Any, x: Any, mask: Any) -> np.ndarray:
    """The output of a training call."""
    return array(layer(tensor(x), training=True, mask=tensor(mask, "bool")))


def counting(channel: int) -> np.ndarray:
    """The values of a channel that count."""
    return X[:, channel][MASK[:, channel]]


def test_each_channel_has_its_own_values() -> None:
    layer = BatchNormalization(axis=1, momentum=0.0)
    output = called(layer, X, MASK)
    for channel in (0, 1):
        values = counting(channel)
        mean, variance = values.mean(), values.var()
        expected = (X[:, channel] - mean) / np.sqrt(variance + 1e-3)
        np.testing.assert_allclose(output[:, channel], expected, atol=1e-5)
        assert array(layer.moving_mean)[channel] == pytest.approx(mean, rel=1e-6)
        assert array(layer.moving_variance)[channel] == pytest.approx(variance, rel=1e-5)
    # Without a value, where others have some, it gives beta, and the moving statistics stay.
    assert (output[:, 2] == 0).all()
    assert (array(layer.moving_mean)[2], array(layer.moving_variance)[2]) == (0, 1)


def test_a_channel_of_one_value_moves_its_mean_alone() -> None:
    layer = BatchNormalization(axis=1, momentum=0.0)
    output = called(layer, X[..., :1], MASK)
    assert array(layer.moving_mean)[1] == pytest.approx(X[1, 1, 0], rel=1e-6)
    assert array(layer.moving_variance)[1:].tolist() == [1, 1]
    assert output[1, 1, 0] == pytest.approx(0, abs=1e-6)


def test_unbiased_variances_and_the_mean_over_all_batches() -> None:
    layer = BatchNormalization(axis=1, momentum=None)
    called(layer, X, MASK)
    called(layer, X[..., :1], MASK)  # one value in the second channel
    assert array(layer.batches_seen).tolist() == [[2, 2, 0], [2, 1, 0]]
    assert array(layer.moving_variance)[1] == pytest.approx(counting(1).var(ddof=1), rel=1e-5)
    both = [counting(0).var(ddof=1), X[:3, 0, 0].var(ddof=1)]
    assert array(layer.moving_variance)[0] == pytest.approx(np.mean(both), rel=1e-5)


def test_renorm() -> None:
    layer = BatchNormalization(axis=1, momentum=0.0, renorm=True, renorm_momentum=0.0)
    output = called(layer, X, MASK)
    for channel in (0, 1):
        values = counting(channel)
        np.testing.assert_allclose(output[:, channel], X[:, channel], atol=1e-4)  # corrected to it
        assert array(layer.renorm_mean)[channel] == pytest.approx(values.mean(), rel=1e-6)
        deviation = np.sqrt(values.var() + 1e-3)
        assert array(layer.moving_stddev)[channel] == pytest.approx(deviation, rel=1e-5)
    assert (output[:, 2] == 0).all()
    assert array(layer.renorm_mean)[2] == 0


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2}])
def test_without_any_value_it_normalises_as_in_inference(options: dict[str, Any]) -> None:
    layer = BatchNormalization(axis=1, beta_initializer="ones", **options)
    output = called(layer, X, np.zeros((4, 3)))
    np.testing.assert_allclose(output, X / np.sqrt(1.001) + 1, atol=1e-5)
    assert array(layer.moving_mean).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [2, 3])
def test_ghost_batches(size: int) -> None:
    """Of 7 samples: one after the other where they are of one size, or all at once."""
    x = RNG.normal(3, 2, (6 if size == 2 else 7, 3, 5))
    mask = RNG.random(x.shape[:2]) < 0.7
    groups = len(x) // size
    mask[1::groups, 1] = False  # nothing in the second channel of the second ghost batch
    drawn = Drawn(x, np.array([1.0, 2.0, 0.5]), np.zeros(3), RNG.normal(size=x.shape), mask)
    with precision("float64"):
        layer = BatchNormalization(axis=1, virtual_batch_size=size, momentum=0.0, dtype="float64")
        found = train(layer, drawn, "float64")
    means, counts = [], []
    for part in (slice(g, None, groups) for g in range(groups)):
        how: dict[str, Any] = {"axis": 1, "mask": mask[part], "fallback": (0, 1)}
        batch = reference.forward(x[part], drawn.gamma, drawn.beta, **how)
        gradient = reference.backward(drawn.gradient[part], x[part], drawn.gamma, **how)
        assert error(found.output[part], batch.output) < 1e-13
        assert error(found.x[part], gradient.x) < 1e-13
        means.append(batch.mean)
        counts.append(batch.count)
    for channel in range(3):
        weights = np.array(counts)[:, channel]
        mean = np.average(np.array(means)[:, channel], weights=weights)
        assert found.moving_mean[channel] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("axis", [1, -1])
def test_one_channel(axis: int) -> None:
    x, mask = X[:, :1] if axis == 1 else X[..., :1], RNG.random((4, 1 if axis == 1 else 3)) < 0.6
    mask[0] = True
    layer = BatchNormalization(axis=axis, momentum=0.0)
    called(layer, x, mask)
    expected = reference.forward(x, axis=axis, mask=mask)
    np.testing.assert_allclose(array(layer.moving_mean), expected.mean, rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), expected.variance, rtol=1e-5)


def test_a_mask_that_fits_only_without_the_channel_axis() -> None:
    mask = RNG.random((4, 5)) < 0.6
    layer = BatchNormalization(axis=1, momentum=0.0)
    called(layer, X, mask)
    values = np.moveaxis(X, 1, -1)[mask]
    np.testing.assert_allclose(array(layer.moving_mean), values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), values.var(0), rtol=1e-5)


def test_where_both_meanings_fit_it_is_keras() -> None:
    x, mask = RNG.normal(3, 2, (4, 5, 5)), RNG.random((4, 5)) < 0.6
    mask[0] = True
    means = []
    for kind in (BatchNormalization, keras.layers.BatchNormalization):
        layer = kind(axis=1, momentum=0.0)
        called(layer, x, mask)
        means.append(array(layer.moving_mean))
    np.testing.assert_allclose(means[0], [x[mask[:, c], c].mean() for c in range(5)], rtol=1e-6)
    np.testing.assert_allclose(means[0], means[1], rtol=1e-5)


def test_a_masking_layer_before_it() -> None:
    x = X.astype("float32")
    x[0, 1] = x[2, 2] = 0.0
    layer = BatchNormalization(axis=1, momentum=0.0)
    inputs = keras.Input((3, 5))
    network = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    network.compile("sgd", "mse")
    network.fit(x, x, batch_size=4, epochs=1, verbose=0)
    expected = [x[:, 0].mean(), x[1:, 1].mean(), x[[0, 1, 3], 2].mean()]
    np.testing.assert_allclose(array(layer.moving_mean), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (4, 5), (9,), (1, 2, 3, 4)])
def test_in_inference_mode_it_decides_nothing(shape: tuple[int, ...]) -> None:
    layer = BatchNormalization(axis=1)
    mask = tensor(np.zeros(shape), "bool")
    masked = layer(tensor(X), training=False, mask=mask)
    np.testing.assert_array_equal(array(masked), array(layer(tensor(X))))
    layer.trainable = False
    np.testing.assert_array_equal(array(layer(tensor(X), training=True, mask=mask)), array(masked))


def test_a_mask_of_numbers() -> None:
    layer = BatchNormalization(axis=1, momentum=0.0)
    layer(tensor(X), training=True, mask=MASK.astype("float32"))
    assert array(layer.moving_mean)[1] == pytest.approx(counting(1).mean(), rel=1e-6)


def test_a_mask_that_does_not_fit() -> None:
    layer = BatchNormalization(axis=1, name="bn")
    with pytest.raises(DataError) as caught:
        layer(tensor(np.ones((2, 3, 4))), training=True, mask=tensor(np.ones((2, 5)), "bool"))
    # Keras puts its own words around what a call raises.
    assert (
        "The mask does not fit the input of BatchNormalization (at 'bn'). Expected: shape (2, 3), "
        "that of the input without its last axis, or (2, 4), without its channel axis. "
        "Received: shape (2, 5) for an input of shape (2, 3, 4)."
    ) in str(caught.value)


def test_sums_for_the_statistics_of_a_data_set() -> None:
    count, found = sums.batch_sums(tensor(X), axis=1, mask=tensor(MASK, "bool"))
    shift, first, second = array(found)
    assert array(count).tolist() == [15, 5, 0]
    for channel in (0, 1):
        values = counting(channel)
        mean = shift[channel] + first[channel] / values.size
        assert mean == pytest.approx(values.mean(), rel=1e-7)
        variance = (second[channel] - first[channel] ** 2 / values.size) / values.size
        assert variance == pytest.approx(values.var(), rel=1e-6)
    common, _ = sums.batch_sums(tensor(X), axis=1, mask=tensor(np.ones((4, 5)), "bool"))
    assert array(common) == 20


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="sizes unknown until run time")
@pytest.mark.parametrize("keras_meaning", [True, False])
def test_sizes_that_are_known_at_run_time_only(keras_meaning: bool) -> None:
    import tensorflow as tf

    layer = BatchNormalization(axis=1, momentum=0.0)
    layer.build((None, 3, None))

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, 3, None), tf.float32),
            tf.TensorSpec((None, None), tf.bool),
        ]
    )
    def step(x: Any, mask: Any) -> Any:
        return layer(x, training=True, mask=mask)

    mask = MASK if keras_meaning else RNG.random((4, 5)) < 0.6
    step(tf.constant(X, tf.float32), tf.constant(mask))
    expected = reference.forward(X, axis=1, mask=mask)
    mean, variance = array(layer.moving_mean), array(layer.moving_variance)
    known = expected.count > 1
    assert known.tolist() == [True, True, not keras_meaning]
    np.testing.assert_allclose(mean[known], expected.mean[known], rtol=1e-5)
    np.testing.assert_allclose(variance[known], expected.variance[known], rtol=1e-5)


def test_recalibration_sees_each_channel_as_training_does() -> None:
    """Channels first: one of them has values in one of two batches only, one in none."""
    x = np.concatenate([X, X + 1]).astype("float32")
    x[:4, 1], x[:, 2] = 0.0, 0.0
    inputs = keras.Input((3, 5))
    first = BatchNormalization(axis=1, beta_initializer="ones", name="first")
    second = BatchNormalization(axis=1, name="second")
    network = keras.Model(inputs, second(first(keras.layers.Masking()(inputs))))

    population = tn.collect(network, x, batch_size=4, upstream="batch")

    of_first, of_second = (population.sites[name] for name in ("first", "second"))
    assert of_first.count.tolist() == of_second.count.tolist() == [40, 20, 0]
    np.testing.assert_allclose(of_first.mean[:2], [x[:, 0].mean(), x[4:, 1].mean()], rtol=1e-6)
    np.testing.assert_allclose(of_second.mean[:2], 1, rtol=1e-5)
    parts = [x[:4, 0], x[4:, 0]]
    shrunk = [part.var() / (part.var() + first.epsilon) for part in parts]
    np.testing.assert_allclose(of_second.variance[0], np.mean(shrunk), rtol=1e-5)

    tn.recalibrate(network, x, batch_size=4, upstream="batch")
    np.testing.assert_allclose(array(first.moving_mean), [*of_first.mean[:2], 0], rtol=1e-6)
    assert array(first.moving_variance)[2] == 1


def test_what_normalises_after_a_channel_without_values() -> None:
    """In training it gives beta: what is collected behind it says so."""
    x = X.astype("float32")
    inputs, mask = keras.Input((3, 5)), keras.Input((3,), dtype="bool")
    first = BatchNormalization(axis=1, beta_initializer="ones", name="first")
    unmasked = first(inputs, mask=mask) * 1.0  # the mask ends here
    outputs = BatchNormalization(axis=1, name="second")(unmasked)
    network = keras.Model([inputs, mask], outputs)
    given = [x, MASK]

    behind = tn.collect(network, given, batch_size=4, upstream="batch").sites["second"]
    assert (behind.mean[2], behind.variance[2]) == pytest.approx((1, 0), abs=1e-6)
    trained = array(first(tensor(x), training=True, mask=tensor(MASK, "bool")))
    np.testing.assert_allclose(behind.mean, trained.mean((0, 2)), atol=1e-6)

    nothing = [x, np.zeros_like(MASK)]
    moving = tn.collect(network, nothing, batch_size=4, upstream="batch").sites["second"]
    np.testing.assert_allclose(moving.mean, array(first(tensor(x))).mean((0, 2)), rtol=1e-5)
