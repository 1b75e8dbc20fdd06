"""The tests behind a verdict, and the power that is promised, against independent computations."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from truenorm._study.equivalence import two_one_sided
from truenorm._study.power import (
    detectable,
    planned,
    planning_spread,
    power_of_difference,
    power_of_equivalence,
    seeds_needed,
)
from truenorm._study.sign_flips import sign_flip

pytestmark = pytest.mark.any_backend


def by_enumeration(differences: np.ndarray) -> float:
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    return float(np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9))


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_sign_flips_by_enumeration(values: list[int]) -> None:
    """Integers have many ties, which count in full."""
    differences = np.array(values) / 3
    assert sign_flip(differences) == pytest.approx(by_enumeration(differences))


@pytest.mark.parametrize("n", [3, 5, 10, 13])
def test_sign_flips_are_scipys_permutation_test(n: int) -> None:
    differences = np.random.default_rng(n).exponential(size=n) - 0.5
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**n
    )
    assert len(theirs.null_distribution) == 2**n  # exact
    assert sign_flip(differences) == pytest.approx(theirs.pvalue)


def test_sign_flips_of_many_seeds() -> None:
    assert sign_flip(np.ones(30)) == pytest.approx(2.0**-29)
    assert sign_flip(np.zeros(30)) == 1.0
    assert sign_flip(np.zeros(0)) is None
    assert sign_flip(np.ones(41)) is None


def test_equivalence_is_the_narrow_interval_inside_the_margin() -> None:
    rng = np.random.default_rng(0)
    decided = set()
    for _ in range(200):
        differences = rng.normal(0.3, 1, 12)
        interval, p_value = two_one_sided(differences, 0.9)
        low, high = stats.t.interval(0.9, 11, differences.mean(), stats.sem(differences))
        assert interval is not None
        assert p_value is not None
        assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))
        assert (p_value < 0.05) == (low > -0.9 and high < 0.9)
        decided.add(p_value < 0.05)
    assert decided == {True, False}


def test_equivalence_needs_a_spread() -> None:
    assert two_one_sided(np.ones(5), 2.0) == (None, None)
    assert two_one_sided(np.ones(1), 2.0) == (None, None)


def test_equivalence_is_not_concluded_where_most_seeds_show_no_difference_at_all() -> None:
    sample = 1 / 36
    mostly, half = np.repeat([0.0, sample], [6, 4]), np.repeat([0.0, sample], [5, 5])
    assert two_one_sided(mostly, 0.1) == (None, None)
    assert two_one_sided(half, 0.1)[1] is not None


def test_power_by_simulation() -> None:
    rng = np.random.default_rng(0)
    for n, effect in ((5, 1.2), (12, 0.9)):
        d = rng.normal(effect, 1.5, (20_000, n))
        t = d.mean(axis=1) / (d.std(axis=1, ddof=1) / math.sqrt(n))
        shown = np.mean(np.abs(t) > stats.t.ppf(0.99, n - 1))
        assert power_of_difference(effect, 1.5, n, 0.02) == pytest.approx(shown, abs=0.015)
        d -= effect
        half = stats.t.ppf(0.95, n - 1) * d.std(axis=1, ddof=1) / math.sqrt(n)
        same = np.mean(np.abs(d.mean(axis=1)) + half < 1.3)
        assert power_of_equivalence(1.3, 1.5, n, 0.05) == pytest.approx(same, abs=0.015)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("pairs", [1, 6, 45])
@pytest.mark.parametrize("effect", [0.5, 2.0, 8.0, 50.0])
def test_power_is_a_number_however_large_the_effect(n: int, pairs: int, effect: float) -> None:
    """scipy's noncentral t gives NaN for some of these; here by simulation."""
    level, rng = 0.05 / pairs, np.random.default_rng(1)
    spread = np.sqrt(rng.chisquare(n - 1, 100_000) / (n - 1))
    mean = rng.normal(effect * math.sqrt(n), 1.0, 100_000)
    shown = np.mean(np.abs(mean) > stats.t.ppf(1 - level / 2, n - 1) * spread)
    assert power_of_difference(effect, 1.0, n, level) == pytest.approx(shown, abs=0.006)


@pytest.mark.parametrize(("n", "pairs"), [(2, 1), (2, 10), (3, 10), (4, 45)])
def test_a_detectable_difference_is_detected_in_four_of_five_studies(n: int, pairs: int) -> None:
    rng = np.random.default_rng(1)
    found = detectable(1.5, n, 0.05 / pairs)
    assert found is not None
    differences = rng.normal(found, 1.5, (100_000, n))
    t = differences.mean(axis=1) / (differences.std(axis=1, ddof=1) / math.sqrt(n))
    shown = np.mean(np.abs(t) > stats.t.ppf(1 - 0.05 / pairs / 2, n - 1))
    assert shown == pytest.approx(0.8, abs=0.006)


def test_the_number_of_seeds_by_the_table() -> None:
    """Cohen's tables: 34 pairs for an effect of half a standard deviation; 15 for 0.8."""
    for effect, n in ((0.5, 34), (0.8, 15)):
        assert seeds_needed(lambda k, e=effect: power_of_difference(e, 1.0, k, 0.05)) == n
    assert seeds_needed(lambda k: power_of_difference(0.01, 1.0, k, 0.05)) is None
    assert detectable(1.0, 34, 0.05) == pytest.approx(0.5, abs=0.01)
    assert power_of_difference(1e6, 1.0, 3, 0.05) == 1.0


def test_plans_allow_for_a_spread_that_was_small_by_luck() -> None:
    rng = np.random.default_rng(0)
    spreads = rng.normal(0, 1, (4000, 5)).std(axis=1, ddof=1)
    enough = np.mean([planning_spread(float(s), 5) >= 1 for s in spreads])
    assert enough == pytest.approx(0.8, abs=0.02)


def test_what_cannot_be_planned() -> None:
    assert planned(0.0, 1.0, 5, margin=None, level=0.05) is None
    assert planned(1.0, 0.0, 5, margin=None, level=0.05) is None
    assert planned(1.0, 1.0, 1, margin=None, level=0.05) is None
    few, many = (planned(0.0, 1.0, 20, margin=m, level=0.05) for m in (1.0, 0.5))
    assert few is not None
    assert many is not None
    assert few < many
    assert detectable(1.0, 1, 0.05) is None
