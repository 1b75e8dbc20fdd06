r"""Batch normalization in ``keras.ops``: any axis, any mask, any backend, any order of derivative.

The corrected two-pass algorithm (Chan, Golub and LeVeque, 1983, equation 1.7): shift by a first
mean :math:`s`, and let the deviations :math:`d_i = x_i - s` correct both moments:

.. math:: \delta = \tfrac1n \sum_i w_i d_i, \qquad \mu = s + \delta, \qquad
          \sigma^2 = \tfrac1n \sum_i w_i (d_i - \delta)^2, \qquad
          y_i = \gamma \frac{d_i - \delta}{\sqrt{\sigma^2 + \epsilon}} + \beta .

In exact arithmetic :math:`\delta = 0`; in float32 it is the rounding error of :math:`s`, which for
a mean of 1000 and a standard deviation of 0.05 would cost three digits of the output. None of the
moments depends on :math:`s`, so it is a constant for the derivatives.

Over several replicas (``gather``), each has its own :math:`n_r, s_r, \delta_r, \sigma_r^2`. These
are merged by the law of total variance around a common :math:`s`, with
:math:`o_r = (s_r - s) + \delta_r`:

.. math:: \delta = \tfrac1n \sum_r n_r o_r, \qquad
          \sigma^2 = \tfrac1n \sum_r n_r \left( \sigma_r^2 + (o_r - \delta)^2 \right) .
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import keras

from truenorm._kernels import blocks
from truenorm._kernels.contract import (
    Kernel,
    Normalized,
    Options,
    Tensor,
    Vector,
    statistics_dtype,
)
from truenorm._kernels.masks import by_channel, silent

ops: Any = keras.ops

Gather = Callable[[Vector], Tensor]
"""From a vector to those of all replicas, one per row; differentiable."""


def normalize(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
    *,
    gather: Gather | None = None,
) -> Normalized:
    """See :mod:`truenorm._kernels`; with ``gather``, of the batches of all replicas together."""
    channel = options.axis % len(x.shape)
    result = normalize_apart(x, gamma, beta, options, (channel,), gather=gather)
    each = options.mask is not None and by_channel(options.mask, channel)
    return Normalized(
        result.output,
        ops.reshape(result.mean, [-1]),
        ops.reshape(result.variance, [-1]),
        ops.reshape(result.count, [-1] if each else []),
    )


def corrected(
    kernel: Kernel, x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options
) -> Normalized:
    """``options.correct`` behind a kernel that does not show statistics before the output."""
    alone = options._replace(relu=False, add=None, correct=None)
    batch = kernel(ops.cast(x, statistics_dtype(x.dtype)), None, None, alone)
    shape = [1] * len(x.shape)
    shape[options.axis] = -1
    scale, offset = (
        ops.reshape(weight, shape) for weight in cast(Any, options.correct)(batch, gamma, beta)
    )
    output = batch.output * scale + offset
    if options.add is not None:
        output = output + ops.cast(options.add, output.dtype)
    output = ops.relu(output) if options.relu else output
    return batch._replace(output=ops.cast(output, x.dtype))


def added_to(batch: Normalized, options: Options) -> Normalized:
    """The sum and the ReLU behind a batch that was normalised without them."""
    output = batch.output + options.add
    return batch._replace(output=ops.relu(output) if options.relu else output)


def normalize_apart(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
    kept: tuple[int, ...],
    *,
    gather: Gather | None = None,
) -> Normalized:
    """Statistics for each index of the axes ``kept``, of which the last holds the channels.

    The statistics and their count come in shapes that stretch to that of ``x``.
    """
    _, epsilon, valid, moving, relu, add, correct = options
    dtype = statistics_dtype(x.dtype)
    values = ops.cast(x, dtype)
    reduced = [a for a in range(len(x.shape)) if a not in kept]
    broadcast = [1] * len(x.shape)
    broadcast[kept[-1]] = ops.shape(x)[kept[-1]]
    valid, count = _counted(x, valid, kept[-1], reduced, dtype)
    share = 1.0 / ops.where(count > 0, count, 1.0)

    def average(terms: Tensor) -> Tensor:
        if valid is not None:
            terms = ops.where(valid, terms, 0.0)
        return blocks.sums(terms, reduced) * share

    # A choice between the product and the difference: without it XLA contracts the two in one
    # place, and rounds the shift in another.
    shift = ops.stop_gradient(average(values))
    shift = ops.where(ops.isfinite(shift), shift, _first(values, reduced))
    deviations = values - shift
    delta = average(deviations)
    variance = average(ops.square(deviations - blocks.spread(delta, values)))
    if gather is not None:
        count, shift, delta, variance = merged(count, shift, delta, variance, gather)
        deviations = values - shift
    if moving is not None and (valid is not None or gather is not None):
        # No valid value: normalise with the statistics given, shifted as the deviations are.
        given_mean, given_variance = (
            ops.reshape(ops.cast(value, dtype), broadcast) for value in moving[:2]
        )
        delta = ops.where(count > 0, delta, given_mean - shift)
        variance = ops.where(count > 0, variance, given_variance)

    scale = ops.rsqrt(variance + epsilon)
    if valid is not None and by_channel(valid, kept[-1]):
        scale = ops.where(silent(count, kept[-1]), 0.0, scale)
    statistics = (ops.stop_gradient(shift + delta), ops.stop_gradient(variance), count)
    if correct is not None:
        vectors = (ops.reshape(values, [-1]) for values in statistics)
        gamma, beta = correct(Normalized(None, *vectors), gamma, beta)
    if gamma is not None:
        scale = scale * ops.reshape(ops.cast(gamma, dtype), broadcast)
    output = (deviations - blocks.spread(delta, values)) * blocks.spread(scale, values)
    if beta is not None:
        offset = ops.reshape(ops.cast(beta, dtype), broadcast)
        output = output + blocks.spread(offset, values)
    if add is not None:
        output = output + ops.cast(add, dtype)
    return Normalized(ops.cast(ops.relu(output) if relu else output, x.dtype), *statistics)


def _first(values: Tensor, reduced: list[int]) -> Tensor | float:
    """The first values, for where the sum of all is no number: of a constant they are the mean.

    0 where there are none, or where they are no numbers; and where :func:`is_whole` does not hold.
    """
    if not is_whole():
        return 0.0
    first = tuple(slice(1) if a in reduced else slice(None) for a in range(len(values.shape)))
    value = ops.sum(ops.stop_gradient(values)[first], axis=reduced, keepdims=True)
    return ops.where(ops.isfinite(value), value, 0.0)


def is_whole() -> bool:
    """Whether a batch has a first row at hand; on JAX it may be divided among several devices."""
    return keras.config.backend() != "jax" or len(keras.distribution.list_devices()) == 1


def _counted(
    x: Tensor, mask: Tensor | None, channel: int, reduced: list[int], dtype: str
) -> tuple[Tensor | None, Tensor]:
    """The mask, stretched over the axes that are reduced, and how many values count."""
    shape = list(ops.shape(x))
    if mask is None:
        rows = 1
        for a in reduced:
            rows = rows * shape[a]
        # A product, because a symbol of PyTorch's would become a number in a cast.
        count = ops.cast(rows, dtype) if ops.is_tensor(rows) else ops.ones((), dtype) * rows
        return None, count
    if not by_channel(mask, channel):
        shape[channel] = 1
    mask = ops.broadcast_to(mask, shape)
    count = ops.sum(ops.cast(mask, "int32"), axis=reduced, keepdims=True)
    return mask, ops.cast(count, dtype)


def merged(
    count: Tensor, shift: Tensor, delta: Tensor, variance: Tensor, gather: Gather
) -> tuple[Tensor, ...]:
    """Count, shift, delta and variance of all replicas together; one collective."""
    shape, own = ops.shape(delta), ops.reshape(count, [-1])
    vectors = (ops.reshape(part, [-1]) for part in (shift, delta, variance))
    rows, width = gather(ops.concatenate([own, *vectors])), ops.shape(own)[0]
    counts, parts = rows[:, :width], ops.reshape(rows[:, width:], [rows.shape[0], 3, -1])
    total = ops.sum(counts, axis=0)
    weights = counts / ops.where(total > 0, total, 1.0)
    shifts, deltas, variances = parts[:, 0], parts[:, 1], parts[:, 2]
    shift = ops.stop_gradient(ops.sum(weights * shifts, axis=0))
    offsets = (ops.stop_gradient(shifts) - shift) + deltas
    delta = ops.sum(weights * offsets, axis=0)
    variance = ops.sum(weights * (variances + ops.square(offsets - delta)), axis=0)
    return ops.reshape(total, ops.shape(count)), *(
        ops.reshape(part, shape) for part in (shift, delta, variance)
    )
