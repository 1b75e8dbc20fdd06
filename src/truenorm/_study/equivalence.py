"""Whether two variants are equivalent: the difference is shown to be smaller than a margin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from truenorm._records.study import Interval


def two_one_sided(differences: np.ndarray, margin: float) -> tuple[Interval | None, float | None]:
    r"""The 90% interval of the mean difference, and the p-value of equivalence.

    Two one-sided t-tests, one against each end of the margin :math:`\delta`:

    .. math:: p = \max\big(
        P(T_{n-1} > \tfrac{\bar d + \delta}{s / \sqrt n}),\;
        P(T_{n-1} < \tfrac{\bar d - \delta}{s / \sqrt n}) \big)

    It is below 5% exactly where the 90% interval lies inside :math:`(-\delta, \delta)`.
    D. J. Schuirmann, "A comparison of the two one-sided tests procedure and the power approach",
    Journal of Pharmacokinetics and Biopharmaceutics 15 (1987).

    Where more than half of the seeds have no difference at all, the metric is too coarse: the few
    that differ, by one validation sample or two, say little about the others, and the test would
    be wrong too often. It gives no answer then.

    Args:
        differences: One finite number per seed.
        margin: The smallest difference of interest, in the metric's units.

    Returns:
        Interval and p-value; None where there is no spread to test against, or where the metric is
        too coarse.
    """
    from scipy import stats

    n = len(differences)
    if n < 2 or float(np.std(differences, ddof=1)) <= 1e-9 * abs(float(np.mean(differences))):
        return None, None
    if 2 * np.count_nonzero(differences == 0) > n:
        return None, None
    low: Any = stats.ttest_1samp(differences, -margin, alternative="greater")
    high: Any = stats.ttest_1samp(differences, margin, alternative="less")
    mean, half = (
        float(np.mean(differences)),
        float(stats.sem(differences) * stats.t.ppf(0.95, n - 1)),
    )
    p_value = max(float(low.pvalue), float(high.pvalue))
    return Interval(mean, mean - half, mean + half, n), None if math.isnan(p_value) else p_value
