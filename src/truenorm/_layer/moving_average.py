r"""One step of a layer's moving statistics toward those of a batch.

With momentum :math:`\alpha`, or with :math:`\alpha = (k - 1) / k` at the k-th batch that counts
(``momentum=None``: the mean over all batches):

.. math:: \hat\mu \leftarrow \alpha \hat\mu + (1 - \alpha) \mu, \qquad
          \hat\sigma^2 \leftarrow \alpha \hat\sigma^2 + (1 - \alpha) c\, \sigma^2 ,

where :math:`c` is 1, or :math:`n / (n - 1)` if the variance is to be unbiased (Bessel; of ghost
batches :math:`n / (n - g)`). With ``momentum=None`` it always is: :math:`E[x] = E_B[\mu_B]` and
:math:`Var[x] = \frac{m}{m-1} E_B[\sigma_B^2]` is algorithm 2 of Ioffe and Szegedy (2015).

A batch enters channel by channel: a mean where it has a value, a variance where it has two, and
neither where one of them is not a finite number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from truenorm._kernels import (
    Normalized,
    Scalar,
    Tensor,
    Variable,
    Vector,
    blend,
    isfinite,
    statistics_dtype,
    where,
)
from truenorm._layer.renorm import Renorm

ops: Any = keras.ops


@dataclass(frozen=True)
class MovingStatistics:
    """The moving statistics of a layer.

    Args:
        mean: The moving mean.
        variance: The moving variance.
        momentum: Weight of the old statistics in a step; None: they are the mean over all batches.
        unbiased: Whether the variance is to be unbiased; with ``momentum=None`` it always is.
        seen: With ``momentum=None``: how many batches gave each channel a mean, and a variance.
        renorm: The further statistics of batch renormalization, if the layer uses it.
    """

    mean: Variable
    variance: Variable
    momentum: float | None
    unbiased: bool
    seen: Variable | None = None
    renorm: Renorm | None = None

    def step(self, batch: Normalized) -> None:
        """Move all of them by one batch, unless the kernel has."""
        if batch.moved is not None:
            for variable, value in zip((self.mean, self.variance), batch.moved, strict=False):
                variable.assign(value)
            return
        some, enough = batch.count > 0, batch.count > batch.batches  # plain booleans, or tensors
        known = isfinite(batch.mean + batch.variance)
        some, enough = (known if yes is True else known & yes for yes in (some, enough))
        variance = batch.variance
        if self.unbiased or self.momentum is None:
            variance = variance * _unbiased(batch.count, batch.batches)
        of_mean, of_variance = self._momenta(some, enough)
        move(self.mean, batch.mean, of_mean, some)
        if self.renorm is None:
            move(self.variance, variance, of_variance, enough)
            return
        deviation = self.renorm.deviation_of
        move(self.renorm.mean, batch.mean, self.renorm.momentum, some)
        move(self.renorm.deviation, deviation(batch.variance), self.renorm.momentum, enough)
        moved = move(self.renorm.moving_deviation, deviation(variance), of_variance, enough)
        derived = self.renorm.variance_of(moved)
        self.variance.assign(where(enough, derived, self.variance.value))

    def _momenta(self, some: Tensor, enough: Tensor) -> tuple[Scalar, Scalar]:
        """The weights of the old mean and variance in this step, whose batch is counted."""
        if self.seen is None:
            return self.momentum, self.momentum
        seen = _wide(self.seen.value)
        counted = seen + ops.cast(ops.stack([some, enough]), seen.dtype)
        self.seen.assign(counted)
        of_mean, of_variance = (counted[i] - 1 for i in (0, 1))
        return (
            of_mean / ops.where(some, counted[0], 1.0),
            of_variance / ops.where(enough, counted[1], 1.0),
        )


def move(variable: Variable, value: Vector, momentum: Scalar, enters: Tensor) -> Vector:
    """Move a variable one step toward the value, where that counts; returns its new value."""
    old = variable.value
    if value.dtype != old.dtype:
        old = _wide(old)
        value = ops.cast(value, old.dtype)
    new = where(enters, blend(old, value, momentum), old)
    variable.assign(new)
    return new


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: PyTorch's ``model.half()`` makes 16-bit tensors of float32 variables."""
    return ops.cast(values, statistics_dtype(values.dtype))


def _unbiased(count: Scalar, batches: Scalar) -> Scalar:
    """Bessel's n / (n - g), in the precision of the count; 1 where it is not defined nor used."""
    if isinstance(count, int):
        return count / (count - batches if count > batches else 1)
    return count / ops.where(count > batches, count - batches, 1.0)
