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

from truenorm._records.tables import counted

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
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

    @classmethod
    def from_sums(cls, count: Any, shift: Array, first: Array, second: Array) -> Moments:
        r"""Moments from sums about a shift s near the mean.

        With :math:`S = \sum (x_i - s)` and :math:`Q = \sum (x_i - s)^2`:
        :math:`\bar x = s + S / n` and :math:`M_2 = Q - S^2 / n`.
        """
        counts = np.broadcast_to(np.asarray(count, dtype=np.float64), shift.shape).copy()
        delta = np.divide(first, counts, out=np.zeros_like(first), where=counts > 0)
        with np.errstate(over="ignore", invalid="ignore"):  # non-finite data stays non-finite
            m2 = second - first * delta
        return cls(counts, shift + delta, np.where(m2 < 0, 0.0, m2))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of values together; commutative and associative up to rounding."""
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        with np.errstate(over="ignore", invalid="ignore"):  # non-finite data stays non-finite
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

    def __repr__(self) -> str:
        values = sorted({int(count) for count in self.count})
        each = "…".join(str(n) for n in dict.fromkeys((values[0], values[-1]))) if values else "no"
        return f"<Moments of {counted(len(self.mean), 'channel')}, {each} values in each>"

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, ready for JSON."""
        return {"count": self.count.tolist(), "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    def __getitem__(self, channels: slice) -> Moments:
        """The moments of some of the channels."""
        return Moments(self.count[channels], self.mean[channels], self.m2[channels])


@dataclass(frozen=True, eq=False, repr=False)
class Spread:
    r"""How much batches differ, from which follows how far a sample's statistics may be off.

    The values of one sample hang together (neighbouring pixels), so the root of their number says
    nothing; batches that were drawn at random are independent. With :math:`B` batches of
    :math:`n_b` values, :math:`N` in all, the standard error of the mean, and that of the variance
    with :math:`\sigma_b^2` for :math:`\mu_b`, is

    .. math:: \mathrm{SE}^2 = \frac{1}{N (B - 1)} \sum_b n_b (\mu_b - \mu)^2 .

    Args:
        batches: Batches that had a value, per channel, shape ``(channels,)``.
        means: Moments of the batch means, each weighted by its count of values.
        variances: Moments of the batch variances, likewise.
    """

    batches: Array
    means: Moments
    variances: Moments

    @classmethod
    def of(cls, batch: Moments) -> Spread:
        """The spread of one batch: none."""
        zero = np.zeros_like(batch.mean)
        return cls(
            (batch.count > 0).astype(np.float64),
            Moments(batch.count, batch.mean, zero),
            Moments(batch.count, batch.variance, zero),
        )

    def __repr__(self) -> str:
        return f"<Spread of {counted(len(self.batches), 'channel')}>"

    def merge(self, other: Spread) -> Spread:
        """The spread of both sets of batches; commutative and associative up to rounding."""
        return Spread(
            self.batches + other.batches,
            self.means.merge(other.means),
            self.variances.merge(other.variances),
        )

    def standard_errors(self, of: Moments) -> tuple[Array, Array]:
        """Of the mean, in standard deviations, and of the standard deviation, relative to itself.

        Per channel; infinite for a single batch, 0 for a constant channel.
        """
        some = (of.variance > 0) & (self.batches > 1)
        unknown = np.where((of.variance > 0) & (self.batches < 2), np.inf, 0.0)
        below = of.count * np.maximum(self.batches - 1, 1)

        def error(moments: Moments, unit: Array) -> Array:
            return np.divide(np.sqrt(moments.m2 / below), unit, out=unknown.copy(), where=some)

        return error(self.means, of.standard_deviation), error(self.variances, 2 * of.variance)

    def standard_error(self, of: Moments) -> float:
        """One number: the larger of the two, each the root mean square over the channels."""
        return max(
            float(np.sqrt(np.square(errors).mean())) if errors.size else 0.0
            for errors in self.standard_errors(of)
        )

    def __getitem__(self, channels: slice) -> Spread:
        """The spread of some of the channels."""
        return Spread(self.batches[channels], self.means[channels], self.variances[channels])


ROWS = 10
"""Numbers per channel in :func:`to_rows`."""


def to_rows(moments: Moments, spread: Spread | None) -> Array:
    """All numbers as one table, shape ``(ROWS, channels)``; zeros where there is no spread."""
    own = [moments.count, moments.mean, moments.m2]
    if spread is not None:
        own.append(spread.batches)
        for part in (spread.means, spread.variances):
            own += [part.count, part.mean, part.m2]
    return np.stack(own + [np.zeros_like(moments.mean)] * (ROWS - len(own)))


def from_rows(rows: Array) -> tuple[Moments, Spread]:
    """The way back from :func:`to_rows`."""
    rows = rows.copy()
    return Moments(*rows[:3]), Spread(rows[3], Moments(*rows[4:7]), Moments(*rows[7:]))
