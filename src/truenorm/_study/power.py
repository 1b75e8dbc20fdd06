"""How many seeds a verdict needs: the power of the tests, for the spread that was seen."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from truenorm._records.moments import Array

POWER = 0.8
"""A number of seeds is enough if a study of that size concludes in 80% of all cases."""

MOST_SEEDS = 1000
"""Larger numbers are reported as more than this."""


def planning_spread(spread: float, n: int) -> float:
    r"""The upper 80% confidence limit of a standard deviation that was seen in n differences.

    .. math:: s \sqrt{(n - 1) / \chi^2_{0.2,\,n-1}}

    A spread seen in few seeds is often too small by luck, and a study planned with it too small as
    well. R. H. Browne, "On the use of a pilot sample for sample size determination", Statistics in
    Medicine 14 (1995).
    """
    from scipy import stats

    return spread * math.sqrt((n - 1) / float(stats.chi2.ppf(0.2, n - 1)))


def power_of_difference(effect: float, spread: float, n: int, level: float) -> float:
    r"""The probability that the two-sided paired t-test shows a true mean difference.

    .. math:: E_s\big[ \Phi\big(\tfrac{\sqrt n\,|\mu| - t\, s}{\sigma}\big)
        + \Phi\big(\tfrac{-\sqrt n\,|\mu| - t\, s}{\sigma}\big) \big] , \qquad
        t = t_{1-\alpha/2,\,n-1}, \quad (n - 1)\, s^2 / \sigma^2 \sim \chi^2_{n-1}

    (The noncentral t distribution, which scipy has no number for where few seeds or many
    comparisons make the effect large.)
    """
    from scipy import stats

    if spread == 0:
        return 1.0
    shift = abs(effect) * math.sqrt(n) / spread
    limit = float(stats.t.ppf(1 - level / 2, n - 1)) * _spreads(n)
    return float(np.mean(stats.norm.cdf(shift - limit) + stats.norm.cdf(-shift - limit)))


def power_of_equivalence(margin: float, spread: float, n: int, level: float) -> float:
    r"""The probability that two one-sided t-tests show equivalence where the true difference is 0.

    .. math:: E_s\big[ 2 \Phi\big(\tfrac{\sqrt n\,\delta - t_{1-\alpha,\,n-1}\, s}{\sigma}\big)
        - 1 \big]_+ , \qquad (n - 1)\, s^2 / \sigma^2 \sim \chi^2_{n-1}
    """
    from scipy import stats

    if spread == 0:
        return 1.0
    limit = float(stats.t.ppf(1 - level, n - 1)) * _spreads(n)
    room = math.sqrt(n) * margin / spread - limit
    return float(np.mean(np.maximum(2 * stats.norm.cdf(room) - 1, 0.0)))


def _spreads(n: int) -> Array:
    """400 equally likely standard deviations of n normal numbers, over the true one."""
    from scipy import stats

    ranks = (np.arange(400) + 0.5) / 400
    return np.sqrt(stats.chi2.ppf(ranks, n - 1) / (n - 1))


def seeds_needed(power: Callable[[int], float]) -> int | None:
    """The smallest number of seeds with a power of 80%; None if it is more than 1,000."""
    high = 2
    while power(high) < POWER:
        if high >= MOST_SEEDS:
            return None
        high = min(2 * high, MOST_SEEDS)
    low = max(1, high // 2)  # known to be too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def detectable(spread: float, n: int, level: float) -> float | None:
    """The true difference that a study of n seeds shows in 80% of all cases."""
    if n < 2 or spread == 0:
        return None
    low, high = 0.0, spread
    while power_of_difference(high, spread, n, level) < POWER:
        high *= 2
    for _ in range(20):
        middle = (low + high) / 2
        enough = power_of_difference(middle, spread, n, level) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def planned(
    difference: float, spread: float, n: int, *, margin: float | None, level: float
) -> int | None:
    """How many seeds a new study needs for a verdict about one pair.

    With a margin: enough to show a difference as large as the margin, and to show equivalence if
    there is no difference. Without one: enough to show the difference that was seen.

    Args:
        difference: The mean difference that was seen.
        spread: Standard deviation of the differences.
        n: How many differences it was seen in.
        margin: The smallest difference of interest.
        level: Of each single test.

    Returns:
        The number of seeds in all; None if it is more than 1,000 or cannot be said.
    """
    if n < 2 or spread == 0 or (margin is None and difference == 0):
        return None
    wide = planning_spread(spread, n)
    effect = difference if margin is None else margin
    needed = seeds_needed(lambda k: power_of_difference(effect, wide, k, level))
    if margin is None or needed is None:
        return needed
    same = seeds_needed(lambda k: power_of_equivalence(margin, wide, k, level))
    return None if same is None else max(needed, same)
