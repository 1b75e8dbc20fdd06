"""Moments are exact, and merge in any order."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from truenorm import DataError, Moments, Population

values = hnp.arrays(
    np.float64,
    st.tuples(st.integers(0, 12), st.just(3)),
    elements=st.floats(-1e6, 1e6, allow_nan=False, width=32),
)


def close(a: Moments, b: Moments) -> bool:
    size = max(1.0, float(np.abs(a.mean).max()))
    return (
        np.array_equal(a.count, b.count)
        and np.allclose(a.mean, b.mean, rtol=1e-12, atol=1e-12 * size)
        and np.allclose(a.m2, b.m2, rtol=1e-9, atol=1e-9 * size**2)
    )


@given(values, values)
def test_merging_two_sets_gives_the_moments_of_both(a: np.ndarray, b: np.ndarray) -> None:
    assert close(Moments.of(a).merge(Moments.of(b)), Moments.of(np.concatenate([a, b])))


@given(values, values)
def test_merging_is_commutative(a: np.ndarray, b: np.ndarray) -> None:
    x, y = Moments.of(a), Moments.of(b)
    assert close(x.merge(y), y.merge(x))


@given(values, values, values)
def test_merging_is_associative(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    x, y, z = Moments.of(a), Moments.of(b), Moments.of(c)
    assert close(x.merge(y).merge(z), x.merge(y.merge(z)))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_batches_of_any_size_give_numpys_mean_and_variance(size: int) -> None:
    x = np.random.default_rng(0).normal(1000, 0.05, size=(103, 4, 5, 2))
    merged = reduce(Moments.merge, (Moments.of(x[i : i + size]) for i in range(0, len(x), size)))
    np.testing.assert_allclose(merged.mean, x.mean((0, 1, 2)), rtol=1e-14)
    np.testing.assert_allclose(merged.variance, x.var((0, 1, 2)), rtol=1e-9)


def test_the_channel_axis_may_be_anywhere() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 5))
    np.testing.assert_allclose(Moments.of(x, axis=1).variance, x.var((0, 2)))


def test_no_data_has_no_variance_and_changes_nothing() -> None:
    some = Moments.of(np.array([[1.0], [3.0]]))
    assert close(Moments.zero(1).merge(some), some)
    assert Moments.of(np.zeros((0, 2))).variance.tolist() == [0.0, 0.0]


def test_an_average_of_batch_variances_is_not_the_variance() -> None:
    """Why moments are merged: batches with different means hide variance in between."""
    batches = [np.array([[0.0], [2.0]]), np.array([[10.0], [12.0]])]
    assert np.mean([b.var() for b in batches]) == 1.0
    assert reduce(Moments.merge, map(Moments.of, batches)).variance[0] == 26.0


@pytest.mark.parametrize(
    ("sites", "upstream", "message"),
    [
        ({"bn": 2}, "batch", "(at 'bn'). Expected: 3 channels. Received: 2 channels."),
        ({}, "batch", "(at 'bn'). Expected: 3 channels. Received: no such site."),
        ({"a": 3, "bn": 3}, "batch", "(at 'a'). Expected: no such site. Received: 3 channels."),
        ({"bn": 3}, "moving", "(at 'upstream'). Expected: batch. Received: moving."),
    ],
)
def test_populations_of_different_models_do_not_merge(
    sites: dict[str, int], upstream: str, message: str
) -> None:
    ours = Population({"bn": Moments.zero(3)}, 4, 1, "batch", 1)
    theirs = Population({p: Moments.zero(n) for p, n in sites.items()}, 4, 1, upstream, 1)
    with pytest.raises(DataError) as caught:
        ours.merge(theirs)
    assert str(caught.value) == (
        "Two populations can be merged only if they are of the same model and upstream " + message
    )
