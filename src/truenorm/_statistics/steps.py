r"""What a step of a layer's averages tells of the batch that it was taken with.

One step from :math:`m_0` to :math:`m_1` with the weight :math:`w` of what is new gives the batch's
own statistics back, whatever the layer saw and however it was compiled:

.. math:: m_1 = (1 - w)\, m_0 + w\, \mu \quad\Rightarrow\quad \mu = m_0 + \frac{m_1 - m_0}{w} .

Of :math:`n` steps with momentum :math:`\alpha` it is :math:`w = 1 - \alpha^n`, and :math:`\mu` is
an average of :math:`n` batches, whose weights have the sum of squares

.. math:: \frac{(1 - \alpha)(1 + \alpha^n)}{(1 + \alpha)(1 - \alpha^n)} ;

of a cumulative average that was over :math:`k` batches, :math:`w = n / (k + n)`, and
:math:`1 / n`. Rounding of float32 in the averages becomes larger by :math:`1 / w`: with momentum
0.99 it is 6e-6 of the mean. A variance that is no larger than what rounding may leave counts as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.values import as_float64
from truenorm._records.moments import Array, Moments

_ROUNDING = {"float32": 2.0**-21, "float64": 2.0**-50}
"""Eight halves of the last digit: what products and sum of a step may be off by together."""


@dataclass(frozen=True, eq=False)
class Averages:
    """A layer's moving statistics at one moment.

    Args:
        mean: The moving mean.
        variance: The moving variance.
        renorm: The mean and the deviation that renorm corrects with; None without it.
        seen: With ``momentum=None``, how many batches they are of.
    """

    mean: Array
    variance: Array
    renorm: tuple[Array, Array] | None
    seen: Array | None

    @classmethod
    def of(cls, layer: BatchNormalizationLike) -> Averages:
        """Those that a layer has now."""
        seen = getattr(layer, "batches_seen", None)
        names = ("renorm_mean", "renorm_stddev") if layer.renorm else ()
        mean, variance, *renorm = (
            _copied(getattr(layer, name)) for name in ("moving_mean", "moving_variance", *names)
        )
        return cls(
            mean,
            variance,
            (renorm[0], renorm[1]) if renorm else None,
            None if seen is None else _copied(seen),
        )

    def equals(self, other: Averages) -> bool:
        """Whether no number is another one."""
        pairs = ((self.mean, other.mean), (self.variance, other.variance))
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class Step:
    """Some steps of a layer's averages.

    Args:
        before: The averages before them.
        batch: Mean and variance of the batch, or of the average of the batches.
        together: The variance of that mean over that of one batch's mean.
    """

    before: Averages
    batch: Moments
    together: float

    @classmethod
    def between(
        cls, layer: BatchNormalizationLike, before: Averages, after: Averages, steps: int
    ) -> Step | None:
        """None where nothing moved, or the numbers do not tell."""
        dtype = keras.backend.standardize_dtype(layer.moving_mean.dtype)
        if dtype not in _ROUNDING or steps < 1 or before.equals(after):
            return None
        weight, together = _weight(layer, before, after, steps)
        if not np.max(weight, initial=0) > 0:
            return None
        olds = before.renorm or (before.mean, before.variance)
        news = after.renorm or (after.mean, after.variance)
        weights = np.broadcast_to(weight, (2, *np.shape(olds[0])))
        mean, second = (
            old + np.divide(new - old, w, out=np.zeros_like(old), where=w > 0)
            for old, new, w in zip(olds, news, weights, strict=True)
        )
        lost = _ROUNDING[dtype] * np.abs(olds[1]) / np.where(weights[1] > 0, weights[1], 1.0)
        variance = second
        if before.renorm is not None:
            variance, lost = np.square(second) - layer.epsilon, 2 * second * lost
        variance = np.where(variance <= lost, 0.0, variance)
        return cls(before, Moments(np.ones_like(mean), mean, variance), together)

    def clipped(self, layer: BatchNormalizationLike) -> float:
        """Share of the channels whose correction renorm has clipped; NaN without renorm."""
        if self.before.renorm is None:
            return np.nan
        mean, deviation = self.before.renorm
        deviation = np.maximum(deviation, np.sqrt(layer.epsilon))
        r = np.sqrt(self.batch.variance + layer.epsilon) / deviation
        d = np.abs(self.batch.mean - mean) / deviation
        limits = {k: v for k, v in (layer.renorm_clipping or {}).items() if v is not None}
        over = (r > limits.get("rmax", np.inf)) | (d > limits.get("dmax", np.inf))
        return float(np.mean(over | (r < limits.get("rmin", 0.0))))


def noise(one: Step, other: Step) -> float:
    """The standard deviation of the batch means, in standard deviations of the values.

    The root mean square over the channels of what two batches in a row differ by.
    """
    variance = (one.batch.variance + other.batch.variance) / 2
    varies = variance > 0
    between = np.square(one.batch.mean - other.batch.mean) / (one.together + other.together)
    return float(np.sqrt(np.mean(between[varies] / variance[varies]))) if varies.any() else 0.0


def _weight(
    layer: BatchNormalizationLike, before: Averages, after: Averages, steps: int
) -> tuple[Any, float]:
    """The weight of what is new, of the mean and of the variance; and the sum of squares."""
    momentum = layer.renorm_momentum if layer.renorm else layer.momentum
    if momentum is not None:
        left = momentum**steps
        weight = 1 - left
        return weight, (1 - momentum) * (1 + left) / ((1 + momentum) * weight) if weight else 0.0
    if before.seen is None or after.seen is None:
        return 0.0, 0.0
    came = after.seen - before.seen
    weight = np.divide(came, after.seen, out=np.zeros_like(came), where=after.seen > 0)
    return weight, 1 / max(float(came.max(initial=0)), 1.0)


def _copied(variable: Any) -> Array:
    return np.array(as_float64(variable))  # on PyTorch the variable's own memory otherwise
