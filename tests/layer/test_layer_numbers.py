"""The layer's numbers: the float64 oracle's, and never worse than the stock layer's."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import CASES, Case, array, error, precision, tensor, train, truth

from truenorm import BatchNormalization, OptionError
from truenorm._kernels import reference

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
POLICIES = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}


def pair(case: Case) -> tuple[Any, Any]:
    """Our layer and the stock one for a case."""
    options: dict[str, Any] = {
        "axis": case.axis,
        "scale": case.scale,
        "center": case.center,
        "dtype": POLICIES.get(case.dtype, case.dtype),
    }
    return BatchNormalization(**options), keras.layers.BatchNormalization(**options)


def stock_can(case: Case) -> bool:
    """Whether the stock layer can take the case at all (masks: Keras's, two channels or more)."""
    keras_mask = case.masked == "keras" or case.axis == -1
    return not case.masked or (keras_mask and case.channels > 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_against_the_oracle_and_the_stock_layer(case: Case) -> None:
    with precision(case.dtype):
        drawn = case.draw()
        true = truth(drawn, case.axis)
        layer, stock = pair(case)
        ours = train(layer, drawn, case.dtype)
        stocks = train(stock, drawn, case.dtype) if stock_can(case) else None
    wide = EPS["float64"] if case.dtype == "float64" else EPS["float32"]
    ulps = {"output": EPS[case.dtype], "x": EPS[case.dtype], "moving_variance": wide}
    # Nothing is wider than float64 to add its values in. The composite sums as Keras does.
    last = case.axis % len(case.shape) == len(case.shape) - 1
    by_channel = case.masked == "keras"
    composite = case.masked and not last and (by_channel or keras.config.backend() != "torch")
    double = case.dtype == "float64"
    ulps |= dict.fromkeys(("gamma", "beta"), (8 if composite else 3 if double else 2) * wide)
    # What is rounded on the way to a mean is of the size of the values, which may be far larger.
    size = np.std(drawn.x) / np.abs(reference.forward(drawn.x, axis=case.axis).mean).max()
    ulps["moving_mean"] = (4 if composite else 3 if double else 1) * wide * max(1, size / 10)
    for name, few in ulps.items():
        want = getattr(true, name)
        if want is None:
            assert getattr(ours, name) is None
            continue
        have = error(getattr(ours, name), want)
        most = min(4 * few, 16 * wide) if few < 16 * wide else 4 * few
        assert have <= most, f"{name}: {have:.2g}, allowed {most:.2g}"
        if stocks is not None:
            assert have <= error(getattr(stocks, name), want) + few, name


@pytest.mark.parametrize("most", [1e20, 3e38])
def test_squares_beyond_float32_are_not_remembered(most: float) -> None:
    # Beyond float32 is the variance in any method that stores it: such a channel's output is beta,
    # or not a number, and its statistics are not written. (The stock layer's are: infinite.)
    x = np.random.default_rng(0).uniform(-1, 1, size=(32, 3))
    x[:, 1] *= most
    layer = BatchNormalization()
    output = array(layer(tensor(x), training=True))
    assert (np.isnan(output[:, 1]) | (np.abs(output[:, 1]) < 1e-3)).all()
    assert np.isfinite(output[:, [0, 2]]).all()
    mean, variance = array(layer.moving_mean), array(layer.moving_variance)
    assert (mean[1], variance[1]) == (0.0, 1.0)
    assert (mean[[0, 2]] != 0).all()


def test_a_constant_near_the_largest_float32() -> None:
    layer = BatchNormalization(momentum=0.0)
    assert (array(layer(tensor(np.full((64, 2), 3e38)), training=True)) == 0).all()
    np.testing.assert_allclose(array(layer.moving_mean), 3e38, rtol=1e-6)
    assert array(layer.moving_variance).tolist() == [0.0] * 2


def test_no_epsilon_is_as_in_the_stock_layer() -> None:
    x = np.array([[1.0, 5.0, 2.0], [3.0, 5.0, 1.0]])  # in the middle 0 / 0
    ours, stocks = (
        array(kind(epsilon=0)(tensor(x), training=True))
        for kind in (BatchNormalization, keras.layers.BatchNormalization)
    )
    assert np.isnan(stocks[:, 1]).all()
    np.testing.assert_allclose(ours, stocks, rtol=1e-6)


def test_constant_channel_gives_beta_and_no_variance() -> None:
    x = np.full((64, 3, 3, 2), [1000.1, -3e5])
    layer = BatchNormalization(momentum=0.0, epsilon=1e-12, beta_initializer="ones")
    assert (array(layer(tensor(x), training=True)) == 1).all()
    assert (array(layer.moving_variance) < 1e-14).all()


@pytest.mark.parametrize("axis", [-1, 1])
def test_one_value_per_channel(axis: int) -> None:
    layer = BatchNormalization(axis=axis, momentum=0.5, beta_initializer="ones")
    x = np.array([[4.0, 8.0]]) if axis == -1 else np.array([[[4.0], [8.0]]])
    assert (array(layer(tensor(x), training=True)) == 1).all()
    assert array(layer.moving_mean).tolist() == [2.0, 4.0]
    assert array(layer.moving_variance).tolist() == [1.0, 1.0]


def test_empty_batch_leaves_the_statistics() -> None:
    layer = BatchNormalization()
    output = layer(tensor(np.zeros((0, 5, 3))), training=True)
    assert tuple(output.shape) == (0, 5, 3)
    assert array(layer.moving_mean).tolist() == [0.0] * 3
    assert array(layer.moving_variance).tolist() == [1.0] * 3


def test_fully_masked_batch_is_normalised_as_in_inference() -> None:
    layer = BatchNormalization(momentum=0.5)
    x = np.random.default_rng(0).normal(3, 2, (8, 5, 3))
    layer(tensor(x), training=True)
    before = [array(w) for w in layer.weights]
    expected = array(layer(tensor(x), training=False))
    nothing = tensor(np.zeros((8, 5)), "bool")
    found = array(layer(tensor(x), training=True, mask=nothing))
    assert error(found, expected) < 4 * EPS["float32"]
    assert all((array(w) == b).all() for w, b in zip(layer.weights, before, strict=True))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_in_one_channel_shows_and_is_not_remembered(poison: float) -> None:
    x = np.random.default_rng(0).normal(3, 2, (16, 4, 3))
    x[3, 1, 1] = poison
    layer = BatchNormalization(momentum=0.9)
    output = array(layer(tensor(x), training=True))
    assert np.isnan(output[3, 1, 1])
    assert np.isfinite(output[..., [0, 2]]).all()
    mean, variance = array(layer.moving_mean), array(layer.moving_variance)
    assert (mean[1], variance[1]) == (0.0, 1.0)
    expected = reference.forward(x[..., [0, 2]])
    np.testing.assert_allclose(mean[[0, 2]], 0.1 * expected.mean, rtol=1e-6)
    np.testing.assert_allclose(variance[[0, 2]], 0.9 + 0.1 * expected.variance, rtol=1e-6)


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_moving_statistics_do_not_get_stuck_in_16_bits(policy: str) -> None:
    layer = BatchNormalization(momentum=0.999, dtype=policy)
    x = tensor(np.random.default_rng(0).normal(2, 1, (64, 4)), policy.removeprefix("mixed_"))
    for _ in range(30):
        output = layer(x, training=True)
    assert keras.backend.standardize_dtype(output.dtype) == policy.removeprefix("mixed_")
    assert layer.moving_mean.dtype == layer.moving_variance.dtype == "float32"
    expected = array(x).mean(axis=0) * (1 - 0.999**30)
    np.testing.assert_allclose(array(layer.moving_mean), expected, rtol=1e-3)


def test_largest_float16() -> None:
    x = np.where(np.arange(64)[:, None] % 2, 6e4, -6e4) * np.ones((1, 3))
    layer = BatchNormalization(dtype="mixed_float16", momentum=0.0)
    output = array(layer(tensor(x, "float16"), training=True))
    np.testing.assert_allclose(np.abs(output), 1, rtol=1e-3)
    np.testing.assert_allclose(
        array(layer.moving_variance), array(tensor(6e4, "float16")) ** 2, rtol=1e-6
    )


def test_integers_are_numbers() -> None:
    x = np.arange(12).reshape(4, 3)
    layer = BatchNormalization()
    output = array(layer(keras.ops.convert_to_tensor(x.astype("int32")), training=True))
    assert error(output, reference.forward(x).output) < 4 * EPS["float32"]


def test_a_keras_mask_from_an_embedding_reaches_the_statistics() -> None:
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    embedding = keras.layers.Embedding(5, 3, mask_zero=True)
    layer = BatchNormalization(momentum=0.0)
    layer(embedding(tokens), training=True)
    valid = array(embedding(tokens))[tokens != 0]
    np.testing.assert_allclose(array(layer.moving_mean), valid.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(array(layer.moving_variance), valid.var(axis=0), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"momentum": 1.5},
            "`momentum` must be the weight of the old moving statistics of BatchNormalization. "
            "Expected: a number from 0 to 1, or None for the mean over all batches. Received: 1.5.",
        ),
        (
            {"momentum": -1.0},
            "`momentum` must be the weight of the old moving statistics of BatchNormalization. "
            "Expected: a number from 0 to 1, or None for the mean over all batches. "
            "Received: -1.0.",
        ),
        (
            {"epsilon": -1.0},
            "The epsilon of BatchNormalization is added to a variance. "
            "Expected: a number of 0 or more. Received: -1.0.",
        ),
    ],
)
def test_impossible_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        BatchNormalization(**options)
    assert str(caught.value) == message


def test_momentum_zero_and_one() -> None:
    x = np.random.default_rng(0).normal(3, 2, (16, 3))
    forgets, keeps = BatchNormalization(momentum=0), BatchNormalization(momentum=1)
    for layer in (forgets, keeps):
        layer(tensor(x), training=True)
    np.testing.assert_allclose(array(forgets.moving_mean), x.mean(axis=0), rtol=1e-6)
    assert array(keeps.moving_mean).tolist() == [0.0] * 3
    assert array(keeps.moving_variance).tolist() == [1.0] * 3


def test_statistics_are_wide_and_counts_stay_integers() -> None:
    class Counting(BatchNormalization):
        def build(self, input_shape: tuple[int, ...]) -> None:
            super().build(input_shape)
            self.steps = self.add_weight(name="steps", dtype="int32", trainable=False)
            self.most = self.add_weight(name="most", shape=(2,), trainable=False)

    layer = Counting(dtype="float16")
    layer.build((None, 2))
    assert [w.dtype for w in layer.weights] == ["float16"] * 2 + ["float32"] * 2 + [
        "int32",
        "float32",
    ]


def test_a_mean_much_larger_than_the_deviation_costs_no_digits() -> None:
    """Keras's own layer gives NaN here on PyTorch: README says so, and we notice a change."""
    x = np.random.default_rng(0).normal(1000.0, 0.05, size=(64, 8, 8, 64)).astype("float32")
    exact = np.float64(x)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-3)
    ours = keras.ops.convert_to_numpy(BatchNormalization()(x, training=True))
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    if keras.config.backend() == "torch":
        stock = keras.layers.BatchNormalization()(x, training=True)
        assert np.isnan(keras.ops.convert_to_numpy(stock)).any()
