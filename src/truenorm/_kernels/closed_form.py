r"""The layer's forward and backward pass in closed form, on arrays of any framework.

With :math:`\hat x` normalised, :math:`r = 1 / \sqrt{\sigma^2 + \epsilon}`,
:math:`g = \partial\ell / \partial y`, and :math:`w_i` 1 for a value that counts and 0 for one that
a mask excludes, the three ways in which the loss reaches x (see ``reference.py``) add up to

.. math:: \frac{\partial\ell}{\partial x_i} = \gamma r \Bigl( g_i - w_i \Bigl(
          \tfrac1n \sum_j g_j + \hat x_i \tfrac1n \sum_j g_j \hat x_j \Bigr) \Bigr) .

The two sums are the gradients of beta and of gamma times :math:`r`. The mean is kept in two parts,
a shift and what rounding took from it (see ``composite.py``).

Everything here is made of operations that can be differentiated again. :func:`backward` takes the
statistics as they are; :func:`backward_of_values` finds them again as functions of the values, so
that its own derivatives are those of the layer to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import keras

from truenorm._kernels.contract import Scalar, Tensor, Vector

ops: Any = keras.ops


class Rows(NamedTuple):
    """How a kernel lays out its values.

    Args:
        total: Sums over all but the channels.
        spread: Makes numbers per channel stretch to values like those given.
        first: One value of each channel, 0 where there is none. None: none is at hand.
    """

    total: Callable[[Tensor], Vector]
    spread: Callable[[Vector, Tensor], Tensor]
    first: Callable[[Tensor], Scalar | Vector] | None = None


class Moments(NamedTuple):
    """The mean as the sum of two, and the population variance."""

    shift: Vector
    delta: Vector
    variance: Vector


def moments(
    rows: Rows,
    values: Tensor,
    share: Scalar,
    counts: Tensor | None = None,
    shift: Vector | None = None,
) -> Moments:
    """Mean and variance of the values that count, each of weight ``share``.

    None of them depends on the shift, so for the derivatives it is a constant.
    """

    def average(terms: Tensor) -> Vector:
        return rows.total(terms if counts is None else ops.where(counts, terms, 0.0)) * share

    if shift is None:
        shift = ops.stop_gradient(average(values))
        first = 0.0
        if rows.first is not None:  # as in composite.py
            first = ops.stop_gradient(rows.first(values))
            first = ops.where(ops.isfinite(first), first, 0.0)
        shift = ops.where(ops.isfinite(shift), shift, first)
    deviations = values - rows.spread(shift, values)
    delta = average(deviations)
    variance = average(ops.square(deviations)) - ops.square(delta)
    return Moments(shift, delta, ops.where(variance < 0, 0.0, variance))  # a NaN stays


def forward(
    rows: Rows, deviations: Tensor, delta: Vector, rstd: Vector, gamma: Vector, beta: Vector
) -> Tensor:
    """The output for ``deviations`` from the shift."""
    scale = rstd * gamma
    return deviations * rows.spread(scale, deviations) + rows.spread(
        beta - delta * scale, deviations
    )


def backward(
    rows: Rows,
    gradient: Tensor,
    deviations: Tensor,
    delta: Vector,
    rstd: Vector,
    gamma: Vector,
    beta: Vector,
    share: Scalar,
    *,
    counts: Tensor | None = None,
    relu: bool = False,
    everyones: Callable[[Vector, Vector], Any] | None = None,
    sums: Callable[..., tuple[Vector, Vector]] | None = None,
) -> tuple[Tensor, Vector, Vector]:
    """The gradients of x, gamma and beta from that of the output.

    Args:
        rows: The layout of the values.
        gradient: The gradient of the output, in the dtype of the statistics.
        deviations: x without the shift.
        delta: What is left of the mean.
        rstd: One over the standard deviation.
        gamma: The scale.
        beta: The offset; only the ReLU's derivative needs it.
        share: One over the number of values that count.
        counts: Which values count in the statistics; None: all.
        relu: Whether a ReLU follows, whose derivative is found from the output, made once more.
        everyones: From the gradients of gamma and beta to their sums over all parts of a batch of
            which the values are one; None: they are all of it.
        sums: What :func:`products` gives for the same values behind the layout, found otherwise.
    """
    if relu:
        gradient = rectified(rows, gradient, deviations, delta, rstd, gamma, beta)
    sums = partial(products, rows) if sums is None else sums
    d_gamma, d_beta = sums(gradient, deviations, delta, rstd)
    whole = (d_gamma, d_beta) if everyones is None else everyones(d_gamma, d_beta)
    means = (whole[0] * share, whole[1] * share)
    d_x = gradient_of_values(rows, gradient, deviations, delta, rstd, gamma, *means, counts)
    return d_x, d_gamma, d_beta


def rectified(
    rows: Rows,
    gradient: Tensor,
    deviations: Tensor,
    delta: Vector,
    rstd: Vector,
    gamma: Vector,
    beta: Vector,
) -> Tensor:
    """The gradient before a ReLU, from that behind it."""
    output = forward(rows, deviations, delta, rstd, gamma, beta)
    return ops.where(output > 0, gradient, 0.0)


def products(
    rows: Rows, gradient: Tensor, deviations: Tensor, delta: Vector, rstd: Vector
) -> tuple[Vector, Vector]:
    """The gradients of gamma and beta."""
    d_beta = rows.total(gradient)
    return (rows.total(gradient * deviations) - delta * d_beta) * rstd, d_beta


def gradient_of_values(
    rows: Rows,
    gradient: Tensor,
    deviations: Tensor,
    delta: Vector,
    rstd: Vector,
    gamma: Vector,
    mean_gamma: Vector,
    mean_beta: Vector,
    counts: Tensor | None,
) -> Tensor:
    """The gradient of x, from those of gamma and beta divided by the number of values."""
    # What is the same for all values of a channel is computed once: dx = g scale + d slope + level.
    scale = gamma * rstd
    slope = -scale * rstd * mean_gamma
    level = -scale * mean_beta - slope * delta
    through = deviations * rows.spread(slope, deviations) + rows.spread(level, deviations)
    if counts is not None:
        through = ops.where(counts, through, 0.0)
    return gradient * rows.spread(scale, gradient) + through


def backward_of_values(
    rows: Rows,
    gradient: Tensor,
    values: Tensor,
    gamma: Vector,
    beta: Vector,
    shift: Vector,
    fallback: Vector,
    count: Scalar,
    epsilon: Any,
    *,
    counts: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Vector, Vector]:
    """:func:`backward` where the statistics depend on the values.

    ``shift`` is a number near their mean. Where the count is 0, it is the mean that normalised, and
    ``fallback`` is the variance.
    """
    share = 1.0 / ops.where(count > 0, count, 1.0)
    _, delta, variance = moments(rows, values, share, counts, shift)
    rstd = ops.rsqrt(ops.where(count > 0, variance, fallback) + epsilon)
    deviations = values - rows.spread(shift, values)
    return backward(
        *(rows, gradient, deviations, delta, rstd, gamma, beta, share), counts=counts, relu=relu
    )
