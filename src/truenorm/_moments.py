r"""Count, mean and sum of squared deviations per channel: exact, and mergeable in any order.

For a set of values :math:`x_1 … x_n`

.. math:: \bar x = \tfrac1n \sum_i x_i, \qquad M_2 = \sum_i (x_i - \bar x)^2,
          \qquad \sigma^2 = M_2 / n .

Two sets *a* and *b* are merged without their data (Chan, Golub and LeVeque, 1983, "Algorithms for
computing the sample variance", The American Statistician 37(3), equations 2.1):

.. math:: \delta = \bar x_b - \bar x_a, \quad n = n_a + n_b, \quad
          \bar x = \bar x_a + \delta\,\frac{n_b}{n}, \quad
          M_2 = M_{2,a} + M_{2,b} + \delta^2\,\frac{n_a n_b}{n} .

The last term is the variance of the batch means: an average of batch variances lacks it, which is
why such an average is not the variance of the whole set (law of total variance).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and M2 of the values seen in each channel, in float64.

    Args:
        count: Number of values per channel, shape ``(channels,)``. (A count of values, not of
            samples: a batch of 8 images of 5x5 pixels has 200 values in each channel.)
        mean: Mean per channel, shape ``(channels,)``, in the input's units.
        m2: Sum of squared deviations from the mean, shape ``(channels,)``, in units squared.
    """

    count: Array
    mean: Array
    m2: Array

    @classmethod
    def zero(cls, channels: int) -> Moments:
        """The moments of no data: what merging starts from."""
        return cls(np.zeros(channels), np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, x: Any, axis: int = -1) -> Moments:
        """Moments of one array; every axis but ``axis`` is reduced."""
        values = np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1)
        values = values.reshape(-1, values.shape[-1])
        if not len(values):
            return cls.zero(values.shape[-1])
        mean = values.mean(axis=0)
        m2 = np.square(values - mean).sum(axis=0)
        return cls(np.full(values.shape[-1], float(len(values))), mean, m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of values together; commutative and associative up to rounding."""
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + np.square(delta) * self.count * share,
        )

    @property
    def variance(self) -> Array:
        """Population variance M2 / count per channel; 0 where nothing was counted."""
        return np.divide(self.m2, self.count, out=np.zeros_like(self.m2), where=self.count > 0)

    @property
    def standard_deviation(self) -> Array:
        """Square root of the population variance, per channel."""
        return np.sqrt(self.variance)

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, ready for JSON."""
        return {"count": self.count.tolist(), "mean": self.mean.tolist(), "m2": self.m2.tolist()}
