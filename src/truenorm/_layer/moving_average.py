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

Batch renormalization (Ioffe, 2017, arXiv:1702.03275) averages :math:`\sqrt{\sigma^2 + \epsilon}`
rather than :math:`\sigma^2`, as Keras's layer does, and derives ``moving_variance`` from it.
"""

from __future__ import annotations

from typing import Any

import keras

from truenorm._kernels import blend, isfinite, where
from truenorm._kernels.contract import Normalized

ops: Any = keras.ops


def step(layer: Any, batch: Normalized) -> None:
    """Move all moving statistics of the layer by one batch, unless the kernel has."""
    if batch.moved is not None:
        for variable, value in zip(
            (layer.moving_mean, layer.moving_variance), batch.moved, strict=False
        ):
            variable.assign(value)
        return
    some, enough = batch.count > 0, batch.count > batch.batches  # plain booleans, or tensors
    known = isfinite(batch.mean + batch.variance)
    some, enough = (known if yes is True else known & yes for yes in (some, enough))
    variance = batch.variance
    if layer.bessel_correction or layer.momentum is None:
        variance = variance * _unbiased(batch.count, batch.batches)
    of_mean, of_variance = layer.momentum, layer.momentum
    if layer.momentum is None:
        seen = layer.batches_seen.value
        counted = seen + ops.cast(ops.stack([some, enough]), seen.dtype)
        layer.batches_seen.assign(counted)
        of_mean, of_variance = (counted[i] - 1 for i in (0, 1))
        of_mean = of_mean / ops.where(some, counted[0], 1.0)
        of_variance = of_variance / ops.where(enough, counted[1], 1.0)

    _move(layer.moving_mean, batch.mean, of_mean, some)
    if not layer.renorm:
        _move(layer.moving_variance, variance, of_variance, enough)
        return
    own = layer.renorm_momentum
    _move(layer.renorm_mean, batch.mean, own, some)
    _move(layer.renorm_stddev, ops.sqrt(batch.variance + layer.epsilon), own, enough)
    stddev = _move(layer.moving_stddev, ops.sqrt(variance + layer.epsilon), of_variance, enough)
    derived = ops.square(stddev) - layer.epsilon
    derived = ops.where(derived > 0, derived, 0.0)
    layer.moving_variance.assign(ops.where(enough, derived, layer.moving_variance.value))


def correction(layer: Any, batch: Normalized) -> tuple[Any, Any]:
    r"""Scale r and shift d of batch renormalization, constants for the derivatives.

    .. math:: r = \mathrm{clip}\Bigl( \frac{\sqrt{\sigma^2 + \epsilon}}{\hat s} \Bigr), \qquad
              d = \mathrm{clip}\Bigl( \frac{\mu - \hat\mu}{\hat s} \Bigr)

    They are 1 and 0 where the batch has no value: it is normalised with the moving statistics.
    """
    limits = layer.renorm_clipping or {}
    mean, stddev = layer.renorm_mean.value, layer.renorm_stddev.value
    least = layer.epsilon**0.5  # no division by zero early in training
    stddev = ops.where(stddev < least, least, stddev)
    r = ops.sqrt(batch.variance + layer.epsilon) / stddev
    d = (batch.mean - mean) / stddev
    r = _clip(r, limits.get("rmin"), limits.get("rmax"))
    most = limits.get("dmax")
    d = _clip(d, None if most is None else -most, most)
    return ops.where(batch.count > 0, r, 1.0), ops.where(batch.count > 0, d, 0.0)


def _unbiased(count: Any, batches: Any) -> Any:
    """Bessel's n / (n - g), in the precision of the count; 1 where it is not defined nor used."""
    if isinstance(count, int):
        return count / (count - batches if count > batches else 1)
    return count / ops.where(count > batches, count - batches, 1.0)


def _move(variable: Any, value: Any, momentum: Any, counts: Any) -> Any:
    old = variable.value
    if keras.backend.standardize_dtype(value.dtype) != variable.dtype:
        value = ops.cast(value, variable.dtype)
    new = where(counts, blend(old, value, momentum), old)
    variable.assign(new)
    return new


def _clip(values: Any, lowest: float | None, highest: float | None) -> Any:
    """Between the limits that there are; a NaN stays one."""
    if lowest is not None:
        values = ops.where(values < lowest, lowest, values)
    return values if highest is None else ops.where(values > highest, highest, values)
