"""The options that the stock layer does not have: numbers by the oracle, configs, files."""

from __future__ import annotations

import pathlib
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import EPSILON, Drawn, array, error, precision, tensor, train

from truenorm import BatchNormalization, OptionError, replace
from truenorm._kernels import reference

RNG = np.random.default_rng(4)
ULP = 2.0**-23


# --- which statistics are kept -----------------------------------------------------------------


def test_momentum_none_is_the_mean_over_all_batches() -> None:
    batches = [RNG.normal(3, 2, (8, 3)) for _ in range(4)]
    batches[1][2, 1] = np.nan  # this batch does not count in channel 1
    layer = BatchNormalization(momentum=None)
    for batch in (*batches, batches[0][:1]):  # the last one has no variance
        layer(tensor(batch), training=True)
    means = np.array([b.mean(0) for b in batches] + [batches[0][0]])
    variances = np.array([b.var(0, ddof=1) for b in batches])
    np.testing.assert_allclose(array(layer.moving_mean), np.nanmean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), np.nanmean(variances, 0), rtol=1e-5)
    assert array(layer.batches_seen).tolist() == [[5, 4, 5], [4, 3, 4]]
    assert layer.weights[-1] is layer.batches_seen


def test_bessel_correction_keeps_unbiased_variances() -> None:
    x = RNG.normal(3, 2, (5, 3))
    layer = BatchNormalization(momentum=0.0, bessel_correction=True)
    output = array(layer(tensor(x), training=True))
    assert error(output, reference.forward(x).output) < 4 * ULP
    np.testing.assert_allclose(array(layer.moving_variance), x.var(0, ddof=1), rtol=1e-6)
    layer(tensor(x[:1]), training=True)
    np.testing.assert_allclose(array(layer.moving_variance), x.var(0, ddof=1), rtol=1e-6)


def test_bessel_correction_in_float64() -> None:
    x = RNG.normal(3, 2, (5, 3))
    with precision("float64"):
        layer = BatchNormalization(momentum=0.0, bessel_correction=True, dtype="float64")
        layer(tensor(x, "float64"), training=True)
        np.testing.assert_allclose(array(layer.moving_variance), x.var(0, ddof=1), rtol=1e-14)


def test_bessel_correction_with_renorm() -> None:
    x = RNG.normal(3, 2, (5, 3))
    layer = BatchNormalization(renorm=True, momentum=None)
    layer(tensor(x), training=True)
    np.testing.assert_allclose(array(layer.moving_variance), x.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(  # what corrects the next batch is compared with its biased one
        array(layer.renorm_stddev), 0.99 + 0.01 * np.sqrt(x.var(0) + EPSILON), rtol=1e-5
    )


# --- ghost batches -----------------------------------------------------------------------------


def by_ghosts(drawn: Drawn, axis: int, groups: int) -> tuple[Any, Any, Any, Any]:
    """Output, gradient of x, and the average mean and variance, ghost batch by ghost batch."""
    output, gradient = np.zeros_like(drawn.x), np.zeros_like(drawn.x)
    means, variances, counts = [], [], []
    for g in range(groups):
        part = slice(g, None, groups)
        options: dict[str, Any] = {"axis": axis, "epsilon": EPSILON}
        options["fallback"] = (np.zeros(len(drawn.gamma)), np.ones(len(drawn.gamma)))
        options["mask"] = None if drawn.mask is None else drawn.mask[part]
        batch = reference.forward(drawn.x[part], drawn.gamma, drawn.beta, **options)
        output[part] = batch.output
        gradient[part] = reference.backward(
            drawn.gradient[part], drawn.x[part], drawn.gamma, **options
        ).x
        means.append(batch.mean)
        variances.append(batch.variance)
        counts.append(batch.count)
    weigh = {"axis": 0, "weights": counts}
    return output, gradient, np.average(means, **weigh), np.average(variances, **weigh)


@pytest.mark.parametrize(
    ("shape", "axis", "groups", "masked"),
    [
        ((14, 3), -1, 3, False),  # ghost batches of 5, 5 and 4 samples
        ((3, 3), -1, 1, False),  # smaller than a ghost batch
        ((160, 2), -1, 40, False),
        ((8, 2, 3, 2), 1, 2, False),
        ((9, 4, 2), -1, 2, True),
        ((8, 4, 2), -1, 2, True),
        ((12, 2, 3), 1, 3, True),
    ],
)
def test_each_ghost_batch_has_its_own_statistics(
    shape: tuple[int, ...], axis: int, groups: int, masked: bool
) -> None:
    x = RNG.normal(3, 2, shape)
    mask = RNG.random(np.delete(shape, axis)) < 0.6 if masked else None
    if mask is not None:
        mask[1::groups] = False  # nothing is valid in the second ghost batch
    gamma, beta = RNG.uniform(0.5, 2, shape[axis]), RNG.normal(size=shape[axis])
    drawn = Drawn(x, gamma, beta, RNG.normal(size=shape), mask)
    with precision("float64"):
        layer = BatchNormalization(axis=axis, virtual_batch_size=4, momentum=0.0, dtype="float64")
        found = train(layer, drawn, "float64")
    output, gradient, mean, variance = by_ghosts(drawn, axis, groups)
    assert error(found.output, output) < 1e-14
    assert error(found.x, gradient) < 1e-13
    assert error(found.moving_mean, mean) < 1e-14
    assert error(found.moving_variance, variance) < 1e-14


def test_ghost_batches_in_fit_with_a_ragged_last_batch() -> None:
    layer = BatchNormalization(virtual_batch_size=4, momentum=0.0, bessel_correction=True)
    network = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(1)])
    network.compile("sgd", "mse")
    x = RNG.normal(3, 2, (21, 3))
    network.fit(x, np.zeros((21, 1)), batch_size=12, shuffle=False, verbose=0)
    ghosts = [x[12::2], x[13::2]]  # 9 samples in the last batch: 5 and 4
    expected = sum(len(g) * g.var(0) for g in ghosts) / (9 - 2)
    np.testing.assert_allclose(array(layer.moving_variance), expected, rtol=1e-5)


# --- activation --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"renorm": True}])
def test_relu_is_part_of_the_layer(options: dict[str, Any]) -> None:
    x = RNG.normal(3, 2, (16, 3))
    drawn = Drawn(x, np.array([1.0, 2.0, 0.5]), RNG.normal(size=3), RNG.normal(size=(16, 3)), None)
    fused = train(BatchNormalization(activation="relu", **options), drawn, "float32")
    plain = train(BatchNormalization(**options), drawn, "float32")
    np.testing.assert_allclose(fused.output, np.maximum(plain.output, 0), atol=1e-6)
    masked = Drawn(x, drawn.gamma, drawn.beta, drawn.gradient * (plain.output > 0), None)
    chained = train(BatchNormalization(**options), masked, "float32")
    assert chained.gamma is not None
    assert chained.beta is not None
    np.testing.assert_allclose(fused.x, chained.x, atol=1e-5)
    np.testing.assert_allclose(fused.gamma, chained.gamma, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fused.beta, chained.beta, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(fused.moving_mean, plain.moving_mean)


def test_any_activation_in_training_and_inference() -> None:
    x = tensor(RNG.normal(3, 2, (8, 3)))
    for activation in ("relu", "sigmoid", keras.activations.gelu):
        layer, plain = BatchNormalization(activation=activation), BatchNormalization()
        function = keras.activations.get(activation)
        for training in (True, False):
            found, expected = layer(x, training=training), function(plain(x, training=training))
            np.testing.assert_allclose(array(found), array(expected), atol=1e-6)


def test_relu_shows_a_nan() -> None:
    x = RNG.normal(size=(8, 2))
    x[0, 0] = np.nan
    output = array(BatchNormalization(activation="relu")(tensor(x), training=True))
    assert np.isnan(output[:, 0]).all()
    assert np.isfinite(output[:, 1]).all()


# --- configs and files -------------------------------------------------------------------------

EXTRAS: tuple[dict[str, Any], ...] = (
    {"momentum": None},
    {"virtual_batch_size": 4},
    {"bessel_correction": True},
    {"activation": "relu"},
    {"accumulation_steps": 2},
    {"domains": 2},
    {"freeze": "statistics"},
)


def test_options_are_in_the_config_only_where_they_are_used() -> None:
    stock = keras.layers.BatchNormalization()
    assert set(BatchNormalization(activation="linear").get_config()) == set(stock.get_config())
    for options in EXTRAS:
        layer = BatchNormalization(**options)
        config = layer.get_config()
        assert set(config) == set(stock.get_config()) | set(options)
        assert config.items() >= options.items()
        assert BatchNormalization.from_config(config).get_config() == config


def test_a_model_with_all_options_comes_back_from_its_file(tmp_path: pathlib.Path) -> None:
    options = {name: value for extra in EXTRAS for name, value in extra.items()}
    layer = BatchNormalization(**{**options, "freeze": "affine"})
    network = keras.Sequential([keras.Input((3,)), layer])
    x = RNG.normal(3, 2, (8, 3))
    network(tensor(x), training=True)
    network.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].get_config() == layer.get_config()
    for ours, theirs in zip(loaded.weights, network.weights, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs))
    expected = array(network(tensor(x)))
    np.testing.assert_array_equal(array(loaded(tensor(x))), expected)


@pytest.mark.parametrize("options", [*EXTRAS, {"synchronized": True}], ids=str)
def test_replace_leaves_what_keras_cannot_express(options: dict[str, Any]) -> None:
    network = keras.Sequential([keras.Input((3,)), BatchNormalization(**options, name="bn")])
    rewrite = replace(network, to="keras")
    as_layer = options == {"activation": "relu"}  # one of its own behind Keras's
    if as_layer or (options == {"synchronized": True} and keras.config.backend() == "tensorflow"):
        assert len(rewrite.changed) == 1
        return
    name = next(iter(options))
    assert not rewrite.changed
    assert rewrite.left[0].reason == f"Keras's layer has nothing like its {name}"
    assert type(rewrite.model.layers[0]) is BatchNormalization


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"virtual_batch_size": 0},
            "virtual_batch_size must be a positive integer. Received: 0.",
        ),
        (
            {"virtual_batch_size": 8, "renorm": True},
            "BatchNormalization has both virtual_batch_size and renorm. Expected: one of the two: "
            "they ask for different statistics of the same batch. "
            "Received: virtual_batch_size=8, renorm=True.",
        ),
        (
            {"virtual_batch_size": 8, "synchronized": "batch"},
            "BatchNormalization has both virtual_batch_size and synchronized. Expected: one of the "
            "two: they ask for different statistics of the same batch. "
            "Received: virtual_batch_size=8, synchronized='batch'.",
        ),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        BatchNormalization(**options)
    assert str(caught.value) == message


def test_ghost_batches_of_channels() -> None:
    with pytest.raises(OptionError) as caught:
        BatchNormalization(virtual_batch_size=8, axis=0, name="bn").build((3, 4))
    assert str(caught.value) == (
        "Ghost batches are parts of the first axis, and here that holds the channels (at 'bn'). "
        "Expected: another channel axis than 0, or no virtual_batch_size. "
        "Received: axis=0, virtual_batch_size=8."
    )
