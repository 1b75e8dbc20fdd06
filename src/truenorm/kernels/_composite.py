r"""Batch normalization in ``keras.ops``: any axis, any mask, any backend, any order of derivative.

The corrected two-pass algorithm (Chan, Golub and LeVeque, 1983, equation 1.7): shift by a first
mean :math:`s`, and let the deviations :math:`d_i = x_i - s` correct both moments:

.. math:: \delta = \tfrac1n \sum_i w_i d_i, \qquad \mu = s + \delta, \qquad
          \sigma^2 = \tfrac1n \sum_i w_i d_i^2 - \delta^2, \qquad
          y_i = \gamma \frac{d_i - \delta}{\sqrt{\sigma^2 + \epsilon}} + \beta .

In exact arithmetic :math:`\delta = 0`; in float32 it is the rounding error of :math:`s`, which for
a mean of 1000 and a standard deviation of 0.05 would cost three digits of the output. None of the
moments depends on :math:`s`, so it is a constant for the derivatives.
"""

from __future__ import annotations

from typing import Any

import keras

from truenorm.kernels._contract import Normalized, statistics_dtype

ops: Any = keras.ops


def normalize(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int,
    epsilon: float,
    mask: Any = None,
    fallback: tuple[Any, Any] | None = None,
) -> Normalized:
    """See :func:`truenorm.kernels.normalize`."""
    dtype = statistics_dtype(x.dtype)
    values = ops.cast(x, dtype)
    channel = axis % len(x.shape)
    reduced = [a for a in range(len(x.shape)) if a != channel]
    shape = ops.shape(x)
    rows = 1
    for a in reduced:
        rows = rows * shape[a]
    broadcast = [1] * len(x.shape)
    broadcast[channel] = shape[channel]

    if mask is None:
        valid = None
        count = ops.cast(rows, dtype)
    else:
        row_shape = list(shape)
        row_shape[channel] = 1
        valid = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), channel), row_shape)
        count = ops.sum(ops.cast(valid, dtype))
    share = 1.0 / ops.where(count > 0, count, 1.0)

    def average(terms: Any) -> Any:
        if valid is not None:
            terms = ops.where(valid, terms, 0.0)
        return ops.sum(terms, axis=reduced, keepdims=True) * share

    shift = ops.stop_gradient(average(values))
    deviations = values - shift
    delta = average(deviations)
    variance = average(ops.square(deviations)) - ops.square(delta)
    variance = ops.where(variance < 0, 0.0, variance)  # Not maximum: it is float32 on PyTorch.
    if valid is not None and fallback is not None:
        # No valid value: normalise with the statistics given, shifted as the deviations are.
        given_mean, given_variance = (
            ops.reshape(ops.cast(value, dtype), broadcast) for value in fallback
        )
        delta = ops.where(count > 0, delta, given_mean - shift)
        variance = ops.where(count > 0, variance, given_variance)

    scale = ops.rsqrt(variance + epsilon)
    if gamma is not None:
        scale = scale * ops.reshape(ops.cast(gamma, dtype), broadcast)
    output = (deviations - delta) * scale
    if beta is not None:
        output = output + ops.reshape(ops.cast(beta, dtype), broadcast)
    return Normalized(
        ops.cast(output, x.dtype),
        ops.stop_gradient(ops.reshape(shift + delta, [-1])),
        ops.stop_gradient(ops.reshape(variance, [-1])),
        count,
    )
