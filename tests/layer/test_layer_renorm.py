"""Batch renormalization: the stock layer's numbers, with masks, and not to be poisoned."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, tensor

from truenorm import BatchNormalization, OptionError

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (16, 3))
OPTIONS: dict[str, Any] = {
    "renorm": True,
    "renorm_clipping": {"rmax": 2.0, "rmin": 0.5, "dmax": 1.0},
    "momentum": 0.9,
    "renorm_momentum": 0.8,
}


def weights(layer: Any) -> dict[str, np.ndarray]:
    return {w.name: array(w) for w in layer.weights}


def test_numbers_and_statistics_are_the_stock_layers() -> None:
    layers = [BatchNormalization(**OPTIONS), keras.layers.BatchNormalization(**OPTIONS)]
    for batch in (X, 2 * X + 1):
        ours, stocks = (array(layer(tensor(batch), training=True)) for layer in layers)
        np.testing.assert_allclose(ours, stocks, rtol=1e-5, atol=1e-6)
    ours, stocks = map(weights, layers)
    assert list(ours) == list(stocks)
    for name, value in ours.items():
        np.testing.assert_allclose(value, stocks[name], rtol=1e-5)
    ours, stocks = (array(layer(tensor(X), training=False)) for layer in layers)
    np.testing.assert_allclose(ours, stocks, rtol=1e-5, atol=1e-6)


def oracle(x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The output of a new layer without clipping, for channels last."""
    mean, stddev = x[valid].mean(0), np.sqrt(x[valid].var(0) + 1e-3)
    r, d = stddev / 1.0, mean / 1.0  # the moving ones are still 0 and 1
    return (x - mean) / stddev * r + d


@pytest.mark.parametrize("axis", [1, -1])
def test_a_mask_counts_what_is_valid_for_any_axis(axis: int) -> None:
    x, valid = RNG.normal(3, 2, (4, 5, 2)), RNG.random((4, 5)) < 0.6
    layer = BatchNormalization(renorm=True, momentum=0.0, axis=axis)
    given = np.moveaxis(x, -1, axis)
    output = array(layer(tensor(given), training=True, mask=tensor(valid, "bool")))
    np.testing.assert_allclose(np.moveaxis(output, axis, -1), oracle(x, valid), atol=1e-5)
    np.testing.assert_allclose(array(layer.moving_mean), x[valid].mean(0), rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), x[valid].var(0), rtol=1e-4)


def test_no_value_leaves_all_statistics_and_normalises_as_inference_does() -> None:
    layer = BatchNormalization(**OPTIONS)
    layer(tensor(X), training=True)
    before = weights(layer)
    nothing = tensor(np.zeros(16), "bool")
    found = array(layer(tensor(X), training=True, mask=nothing))
    np.testing.assert_allclose(found, array(layer(tensor(X), training=False)), atol=1e-5)
    layer(tensor(np.zeros((0, 3))), training=True)
    assert all((value == before[name]).all() for name, value in weights(layer).items())


def test_poison_stays_in_its_channel_and_is_not_remembered() -> None:
    x = X.copy()
    x[3, 1] = np.nan
    layer, clean = BatchNormalization(**OPTIONS), BatchNormalization(**OPTIONS)
    output = array(layer(tensor(x), training=True))
    clean(tensor(X), training=True)
    assert np.isnan(output[:, 1]).any()
    assert np.isfinite(output[:, [0, 2]]).all()
    new = BatchNormalization(**OPTIONS)
    new.build((None, 3))
    untouched, moved = weights(new), weights(clean)
    for name, value in weights(layer).items():
        assert value[1] == untouched[name][1], name
        np.testing.assert_allclose(value[[0, 2]], moved[name][[0, 2]], rtol=1e-6)


def test_one_value_per_channel_moves_the_means_only() -> None:
    layer = BatchNormalization(**OPTIONS)
    layer.build((None, 3))
    before = weights(layer)
    layer(tensor(X[:1]), training=True)
    changed = {name for name, value in weights(layer).items() if (value != before[name]).any()}
    assert changed == {"moving_mean", "renorm_mean"}


@pytest.mark.parametrize(
    ("clipping", "problem"),
    [
        ({"max": 1.0}, "Received invalid keys in the renorm_clipping of BatchNormalization"),
        ({"max": None}, "Received invalid keys in the renorm_clipping of BatchNormalization"),
        (
            {"rmax": 1.0, "rmin": 2.0},
            "In the renorm_clipping of BatchNormalization rmax should be rmin or more",
        ),
        (
            {"dmax": -1.0},
            "In the renorm_clipping of BatchNormalization dmax should be non-negative",
        ),
    ],
)
def test_impossible_limits(clipping: dict[str, float | None], problem: str) -> None:
    with pytest.raises(OptionError) as caught:
        BatchNormalization(renorm=True, renorm_clipping=clipping)
    assert str(caught.value) == (
        f"{problem}. Expected: rmin and rmax with rmin <= rmax, and dmax of 0 or more; each may be "
        f"missing. Received: {clipping!r}."
    )
