"""Moments are exact, and merge in any order."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from truenorm import DataError, Moments, Population
from truenorm._records.moments import Spread

pytestmark = pytest.mark.any_backend

values = hnp.arrays(
    np.float64,
    st.tuples(st.integers(0, 12), st.just(3)),
    elements=st.floats(-1e6, 1e6, allow_nan=False, width=32),
)


def close(a: Moments, b: Moments, offset: float = 0.0) -> bool:
    """Up to rounding, which grows with the values and with what is taken off them."""
    size = max(1.0, offset, float(np.abs(a.mean).max()))
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


@given(values, values, values)
def test_spreads_merge_in_any_order(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    x, y, z = (Spread.of(Moments.of(part)) for part in (a, b, c))
    one, other = x.merge(y).merge(z), z.merge(y.merge(x))
    assert close(one.means, other.means)
    np.testing.assert_array_equal(one.batches, other.batches)
    size = max(1.0, float(np.abs(other.variances.mean).max()))
    np.testing.assert_allclose(one.variances.m2, other.variances.m2, atol=1e-9 * size**2)


@given(values, st.floats(-1e6, 1e6))
def test_sums_about_any_shift_give_the_moments(x: np.ndarray, near: float) -> None:
    offset = 1e-3 * near
    shift = x.mean(0) + offset if len(x) else np.full(3, near)
    deviations = x - shift
    sums = (shift, deviations.sum(0), np.square(deviations).sum(0))
    found, true = Moments.from_sums(len(x), *sums), Moments.of(x)
    if len(x):
        assert close(found, true, abs(offset))
    else:
        assert found.variance.tolist() == [0.0] * 3


def test_the_standard_error_is_what_repeating_the_sample_shows() -> None:
    """Samples of 25 values that hang together: the number of values promises too much."""
    random = np.random.default_rng(0)

    def draw() -> tuple[Moments, Spread]:
        levels = random.normal(size=(40, 5, 1))
        batches = levels + random.normal(size=(40, 5, 25)) * random.gamma(2, 1, size=(40, 5, 1))
        parts = [Moments.of(batch.reshape(-1, 1)) for batch in batches]
        return reduce(Moments.merge, parts), reduce(Spread.merge, map(Spread.of, parts))

    drawn = [draw() for _ in range(400)]
    means = np.array([moments.mean[0] for moments, _ in drawn])
    deviations = np.array([moments.standard_deviation[0] for moments, _ in drawn])
    errors = np.array([[e[0] for e in s.standard_errors(m)] for m, s in drawn])
    true = np.array([means.std(), deviations.std()]) / deviations.mean()
    np.testing.assert_allclose(np.sqrt(np.square(errors).mean(0)), true, rtol=0.15)
    assert true[0] > 2 / np.sqrt(40 * 125)  # twice what independent values would have


def test_one_batch_says_nothing_of_the_error() -> None:
    one = Moments.of(np.array([[1.0, 4.0], [3.0, 4.0]]))
    mean, deviation = Spread.of(one).standard_errors(one)
    assert mean.tolist() == deviation.tolist() == [np.inf, 0.0]  # a constant channel is certain


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
