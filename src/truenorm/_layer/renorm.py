r"""Batch renormalization (Ioffe, 2017, arXiv:1702.03275): its statistics and its correction.

It averages :math:`\sqrt{\sigma^2 + \epsilon}` rather than :math:`\sigma^2`, as Keras's layer does,
and derives ``moving_variance`` from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from truenorm._kernels import Normalized, Tensor, Variable, Vector, where

ops: Any = keras.ops


@dataclass(frozen=True)
class Renorm:
    """The statistics that a layer with batch renormalization has besides.

    Args:
        mean: ``renorm_mean``, which corrects the batch's.
        deviation: ``renorm_stddev``, likewise.
        moving_deviation: ``moving_stddev``, from which the moving variance is derived.
        momentum: Weight of the old ``mean`` and ``deviation`` in a step.
        clipping: Limits ``rmin``, ``rmax``, ``dmax`` of the correction; each may be missing.
        epsilon: The layer's.
    """

    mean: Variable
    deviation: Variable
    moving_deviation: Variable
    momentum: float
    clipping: Mapping[str, float | None]
    epsilon: float

    def deviation_of(self, variance: Vector) -> Vector:
        """What is averaged in place of a variance: the root of it and epsilon."""
        return ops.sqrt(variance + self.epsilon)

    def variance_of(self, deviation: Vector) -> Vector:
        """The variance that belongs to such an average."""
        derived = ops.square(deviation) - self.epsilon
        return where(derived > 0, derived, 0.0)

    def correction(self, batch: Normalized) -> tuple[Vector, Vector]:
        r"""Scale r and shift d, constants for the derivatives.

        .. math:: r = \mathrm{clip}\Bigl( \frac{\sqrt{\sigma^2 + \epsilon}}{\hat s} \Bigr), \qquad
                  d = \mathrm{clip}\Bigl( \frac{\mu - \hat\mu}{\hat s} \Bigr)

        They are 1 and 0 where the batch has no value: it is normalised with the moving statistics.
        """
        # Their own dtype may be another: PyTorch's model.double() changes that of the tensors.
        mean, deviation = (
            ops.cast(variable.value, batch.mean.dtype) for variable in (self.mean, self.deviation)
        )
        least = self.epsilon**0.5  # no division by zero early in training
        deviation = where(deviation < least, least, deviation)
        r = self.deviation_of(batch.variance) / deviation
        d = (batch.mean - mean) / deviation
        r = _clip(r, self.clipping.get("rmin"), self.clipping.get("rmax"))
        most = self.clipping.get("dmax")
        d = _clip(d, None if most is None else -most, most)
        some = batch.count > 0
        if isinstance(some, bool):  # An empty batch has no output.
            return r, d
        return where(some, r, 1.0), where(some, d, 0.0)

    def correct(
        self, batch: Normalized, gamma: Vector | None, beta: Vector | None
    ) -> tuple[Vector, Vector]:
        r"""What takes the place of gamma and beta (``Options.correct``).

        .. math:: y = \hat x \, (r \gamma) + (d \gamma + \beta)
        """
        scale, offset = self.correction(batch)
        if gamma is not None:
            gamma = ops.cast(gamma, scale.dtype)
            scale, offset = scale * gamma, offset * gamma
        if beta is not None:
            offset = offset + ops.cast(beta, offset.dtype)
        return scale, offset


def _clip(values: Tensor, lowest: float | None, highest: float | None) -> Tensor:
    """Between the limits that there are; a NaN stays one."""
    if lowest is not None:
        values = where(values < lowest, lowest, values)
    return values if highest is None else where(values > highest, highest, values)
