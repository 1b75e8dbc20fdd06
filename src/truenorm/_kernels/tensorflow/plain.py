"""TensorFlow: forward and backward pass over rows in its own operations.

Rows are (outer, channels), or (outer, channels, inner) where the channels are not last. Both take
and return tensors only; what else they need is in :class:`Plan`. ``native.py`` has functions of the
same names.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels import blocks, closed_form
from truenorm._kernels.contract import Scalar, Tensor, Vector

tf: Any = tensorflow

APART = 17
"""One row in so many: no power of 2, with which rows of pictures repeat."""


BLOCK = 32
"""XLA sums up to so many rows as it makes them, and writes more of them to memory first."""


class Step(NamedTuple):
    """The step of the moving statistics: their weight, and whether the variance is unbiased."""

    momentum: float
    unbiased: bool


class Plan(NamedTuple):
    """What a kernel is for, beside its tensors.

    Args:
        epsilon: Added to the variance.
        relu: Whether a ReLU follows.
        step: The step of the moving statistics; None: they are not among the tensors.
        masked: Whether a mask (outer,) is the last of the tensors.
        known: Whether the statistics are among the tensors.
    """

    epsilon: float
    relu: bool
    step: Step | None
    masked: bool
    known: bool = False


def forward(
    plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """Both halves: :func:`normalize` with the :func:`moments`."""
    (kept,) = moments(plan, rows, gamma, beta, *others)
    return *normalize(plan, rows, gamma, beta, kept), kept


def moments(
    plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, *others: Tensor
) -> tuple[Tensor]:
    """In rows: mean, variance, what rounding takes from the mean, and rstd.

    And the moving mean and variance after the step, if there is one.
    """
    del beta
    moving = others[:2] if plan.step else ()
    mask = others[-1] if plan.masked else None
    values, counts = tf.cast(rows, gamma.dtype), _spread_mask(mask, rows)
    count = _count(rows, mask, gamma.dtype)
    shift, delta, variance = moments_of_values(values, _share(count), counts)
    if moving:  # They normalise where nothing counts.
        delta = tf.where(count > 0, delta, moving[0] - shift)
        variance = tf.where(count > 0, variance, moving[1])
    rstd = tf.math.rsqrt(variance + plan.epsilon)
    mean = shift + delta
    low = (shift - mean) + delta  # what rounding takes from the mean
    moved = _moved(plan.step, moving, (mean, variance), count) if plan.step else ()
    return (tf.stack([mean, variance, low, rstd, *moved]),)


def normalize(plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, kept: Tensor) -> tuple[Tensor]:
    """The output, with statistics that are known."""
    mean, _, low, rstd = tf.unstack(kept[:4])
    deviations = tf.cast(rows, gamma.dtype) - _spread(mean, rows)
    output = closed_form.forward(ROWS, deviations, low, rstd, gamma, beta)
    return (tf.cast(tf.nn.relu(output) if plan.relu else output, rows.dtype),)


def backward(
    plan: Plan,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    kept: Tensor,
    gradient: Tensor,
    *mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient of a loss with respect to rows, and in rows: that of gamma and of beta."""
    mean, _, low, rstd = tf.unstack(kept[:4])
    counting = mask[0] if plan.masked else None
    d_rows, *sums = closed_form.backward(
        ROWS,
        tf.cast(gradient, gamma.dtype),
        tf.cast(rows, gamma.dtype) - _spread(mean, rows),
        *(low, rstd, gamma, beta, _share(_count(rows, counting, gamma.dtype))),
        counts=_spread_mask(counting, rows),
        relu=plan.relu,
    )
    return tf.cast(d_rows, rows.dtype), tf.stack(sums)


def second(
    plan: Plan,
    cotangents: Any,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    kept: Tensor,
    gradient: Tensor,
    *mask: Tensor,
) -> Any:
    """The derivatives of the backward pass with respect to rows, gamma and gradient."""
    counting = mask[0] if plan.masked else None
    with tf.GradientTape() as tape:
        tape.watch((rows, gamma, gradient))
        d_rows, d_gamma, d_beta = closed_form.backward_of_values(
            ROWS,
            tf.cast(gradient, gamma.dtype),
            tf.cast(rows, gamma.dtype),
            gamma,
            beta,
            shift=kept[0],
            fallback=kept[1],
            count=_count(rows, counting, gamma.dtype),
            epsilon=plan.epsilon,
            counts=_spread_mask(counting, rows),
            relu=plan.relu,
        )
        first = (tf.cast(d_rows, rows.dtype), tf.stack([d_gamma, d_beta]))
    return tape.gradient(first, (rows, gamma, gradient), output_gradients=cotangents)


def moments_of_values(values: Tensor, share: Scalar, counts: Tensor | None) -> closed_form.Moments:
    """Mean and variance of the values that count, in two passes where all do.

    The first is from the mean of a few rows, which is within 4 standard deviations of that of all
    (see ``sums.py``). With a mask those few may be the ones that do not count.
    """
    if counts is not None:
        return closed_form.moments(ROWS, values, share, counts)
    some = values[::APART]
    shift = _total(some) * _share(_count(some, None, values.dtype))
    first = _first(values)  # see composite.py
    first = tf.where(tf.math.is_finite(first), first, 0.0)
    shift = tf.stop_gradient(tf.where(tf.math.is_finite(shift), shift, first))
    deviations = values - _spread(shift, values)
    delta = _total(deviations) * share
    variance = _total(tf.square(deviations - _spread(delta, values))) * share
    return closed_form.Moments(shift, delta, variance)


def _moved(
    step: Step, moving: tuple[Vector, ...], batch: tuple[Vector, Vector], n: Scalar
) -> tuple[Vector, Vector]:
    """The moving statistics after the step, by the rules of ``_layer/moving_average.py``."""

    def toward(old: Vector, new: Vector, enters: Tensor) -> Vector:
        return tf.where(enters & known, old * step.momentum + new * (1 - step.momentum), old)

    mean, variance = batch
    known = tf.math.is_finite(mean + variance)
    if step.unbiased:
        variance = variance * (n / tf.where(n > 1, n - 1, 1.0))
    return toward(moving[0], mean, n > 0), toward(moving[1], variance, n > 1)


def _count(rows: Tensor, mask: Tensor | None, dtype: Any) -> Scalar:
    """How many values of a channel count."""
    if mask is not None:
        return tf.cast(tf.math.count_nonzero(mask), dtype)
    shape = tf.shape(rows)
    return tf.cast(shape[0] if len(rows.shape) == 2 else shape[0] * shape[2], dtype)


def _share(count: Scalar) -> Scalar:
    return 1.0 / tf.maximum(count, 1.0)


def _total(rows: Tensor) -> Vector:
    if len(rows.shape) == 3:
        # In two steps that XLA does not merge into one: it would add all numbers in sequence.
        sums = blocks.total(rows, 2, BLOCK)[..., 0]
        rows = tf.where(tf.math.is_nan(sums), tf.constant(math.nan, sums.dtype), sums)
    return blocks.total(rows, 0, BLOCK)[0]


def _spread(per_channel: Vector, rows: Tensor) -> Tensor:
    return per_channel if len(rows.shape) == 2 else per_channel[:, None]


def _spread_mask(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if mask is None else tf.reshape(mask, [-1, *[1] * (len(rows.shape) - 1)])


def _first(rows: Tensor) -> Vector:
    if len(rows.shape) == 3:
        rows = rows[..., :1]
    return tf.reduce_sum(rows[:1], [0, *range(2, len(rows.shape))])


ROWS = closed_form.Rows(_total, _spread, _first)
