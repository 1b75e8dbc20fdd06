"""Ghost batches: each part of a batch normalised with its own statistics.

Hoffer, Hubara and Soudry (2017), "Train longer, generalize better", arXiv:1705.08741. As in
``tf.keras`` 2 (``virtual_batch_size``), sample i is in ghost batch i mod g, and the statistics to
remember are the ghost batches' average. There the size had to divide the batch. Here a batch of n
samples makes max(1, n // size) ghost batches, whose sizes differ by one at most and are below the
size asked for only if the whole batch is; and the average is weighted by count.

Where ghost batches are of equal size, a fast kernel takes them, if there is one: where the samples
are rows of channels, all at once, as one batch that has the channels of each ghost batch side by
side (on JAX also where the channels are last, without a copy); else one after the other, if they
are not many. What is left the composite takes at once, each as one index of an axis that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import keras

from truenorm._kernels.composite import normalize_apart
from truenorm._kernels.contract import Kernel, Moving, Normalized, Options, Scalar, Tensor, Vector
from truenorm._kernels.masks import by_channel

ops: Any = keras.ops

MOST_CALLS = 32

Grouped: TypeAlias = Callable[..., Normalized]
"""A kernel for several ghost batches without a mask, which takes their number as ``groups``.

gamma and beta are those of each ghost batch in turn, and so are the statistics.
"""


def normalize_ghosts(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
    *,
    size: int,
    each: Kernel | None = None,
    grouped: Grouped | None = None,
    most_calls: int = MOST_CALLS,
) -> Normalized:
    """See :mod:`truenorm._kernels`; ``size`` is the number of samples in a ghost batch.

    ``each`` is a kernel for one of them, which is called so often at most; ``grouped`` is one for
    all, where the channels are last.
    """
    mask, moving = options.mask, options.moving
    channel = options.axis % len(x.shape)
    several = mask is not None and by_channel(mask, channel)
    samples, *inner = ops.shape(x)
    static = isinstance(samples, int)
    groups = max(1, samples // size) if static else ops.maximum(1, samples // size)
    equal = static and samples % groups == 0
    if equal and mask is None:
        if grouped is None or channel != len(inner):
            grouped = None if each is None or channel != 1 else partial(_side_by_side, each)
        if grouped is not None:
            return _at_once(grouped, groups, x, gamma, beta, options._replace(axis=channel))
    if each is not None and equal and groups <= most_calls:
        fallback = None if moving is None else Moving(moving.mean, moving.variance)
        options = options._replace(axis=channel, moving=fallback)
        output, ghosts = _one_by_one(each, groups, x, gamma, beta, options)
        return Normalized(output, *_pooled(ghosts, groups, several))
    rows = -(-samples // groups)
    padding = rows * groups - samples

    def split(values: Tensor) -> Tensor:
        # What fills up the last row is any of the values: it does not count.
        padded = ops.concatenate([values, values[:padding]])
        return ops.reshape(padded, [rows, groups, *ops.shape(values)[1:]])

    valid = None
    if mask is not None or not static or padding:
        stretched = [samples, *inner]
        if not several:
            stretched[channel] = 1
        given = ops.broadcast_to(True if mask is None else mask, stretched)
        inside = ops.reshape(ops.arange(rows * groups) < samples, [rows, groups, *[1] * len(inner)])
        valid = ops.logical_and(split(given), inside)
    options = options._replace(mask=valid)
    result = normalize_apart(split(x), gamma, beta, options, (1, channel + 1))
    output = ops.reshape(result.output, [rows * groups, *inner])[:samples]
    return Normalized(output, *_pooled(result[1:4], groups, several))


def _side_by_side(
    each: Kernel,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
    *,
    groups: int,
) -> Normalized:
    """A :data:`Grouped` where the samples are rows of channels: the groups become channels."""
    samples, channels, *inner = ops.shape(x)
    rows = ops.reshape(x, [samples // groups, groups * channels, *inner])
    found = each(rows, gamma, beta, options)
    return found._replace(output=ops.reshape(found.output, ops.shape(x)))


def _at_once(
    grouped: Grouped,
    groups: int,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
) -> Normalized:
    """All by one call, and their statistics together: the averages, since all are of equal size."""
    scale, offset = (None if w is None else ops.tile(w, groups) for w in (gamma, beta))
    found = grouped(x, scale, offset, options._replace(moving=None), groups=groups)
    count = ops.cast(found.count, found.mean.dtype)

    def average(statistic: Vector) -> Vector:
        each = ops.reshape(statistic, [groups, -1])
        first = ops.sum(each, axis=0) / groups
        return first + ops.sum(each - first, axis=0) / groups  # what rounding took from it

    numbers = (count * groups, ops.cast(count > 0, count.dtype) * groups)
    return Normalized(found.output, average(found.mean), average(found.variance), *numbers)


def _one_by_one(
    each: Kernel,
    groups: int,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and mean, variance and count of each ghost batch."""

    def split(values: Tensor) -> list[Tensor]:
        samples, *inner = ops.shape(values)
        return ops.unstack(ops.reshape(values, [samples // groups, groups, *inner]), groups, 1)

    masks = [None] * groups
    if options.mask is not None:
        shape = list(ops.shape(options.mask))
        shape[0] = ops.shape(x)[0]
        masks = split(ops.broadcast_to(options.mask, shape))
    parts = [
        each(part, gamma, beta, options._replace(mask=mask))
        for part, mask in zip(split(x), masks, strict=True)
    ]
    output = ops.reshape(ops.stack([part.output for part in parts], 1), ops.shape(x))
    dtype = parts[0].mean.dtype
    return output, tuple(
        ops.reshape(ops.stack([ops.cast(value, dtype) for value in values]), [1, groups, -1])
        for values in zip(*(part[1:4] for part in parts), strict=True)
    )


def _pooled(
    ghosts: tuple[Tensor, ...], groups: Scalar, several: bool
) -> tuple[Vector, Vector, Scalar | Vector, Scalar | Vector]:
    """Mean, variance, count, and number of ghost batches with values, over all of them.

    The latter two may be ``several``: one for each channel.
    """
    mean, variance, count = ghosts
    counts = count * ops.ones([1, groups, *[1] * (len(mean.shape) - 2)], mean.dtype)
    total = ops.sum(counts, axis=1)
    weights = counts / ops.where(total > 0, total, 1.0)[:, None]

    def total_of(terms: Tensor) -> Tensor:
        return ops.sum(ops.where(counts > 0, weights * terms, 0.0), axis=1, keepdims=True)

    def average(statistic: Tensor) -> Vector:
        first = total_of(statistic)
        return ops.reshape(first + total_of(statistic - first), [-1])  # what rounding took from it

    filled = ops.sum(ops.cast(counts > 0, counts.dtype), axis=1)
    numbers = (ops.reshape(value, [-1] if several else []) for value in (total, filled))
    return average(mean), average(variance), *numbers
