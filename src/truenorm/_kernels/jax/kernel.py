r"""JAX: compiled sums, the closed-form backward over two-dimensional rows; XLA does the rest.

Rows are (outer, channels[, inner]) or, of ghost batches, (outer, groups, run, width) with channels
of their own for each group.

Only x, the mean (as shift and correction, see ``composite.py``) and rstd are kept, and behind a sum
which outputs have passed the ReLU. JAX differentiates both rules as ordinary code, so reverse mode,
and forward over reverse (``jax.hessian``), are right to any order. Forward mode alone (``jax.jvp``,
``jax.jacfwd`` of the layer in training mode) is not defined by a closed-form backward: with a mask,
also one that is true everywhere, JAX differentiates the forward pass, around the moments, whose
rule stands here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
from jax import numpy as jnp

from truenorm._kernels import closed_form, composite, ghosts
from truenorm._kernels.contract import (
    Moving,
    Normalized,
    Options,
    Scalar,
    Tensor,
    Vector,
    statistics_dtype,
)
from truenorm._kernels.jax import native, synchronized
from truenorm._kernels.jax.synchronized import Axes
from truenorm._kernels.masks import by_channel, silent


class Plan(NamedTuple):
    """What a kernel is for, beside its tensors.

    Args:
        epsilon: Added to the variance.
        relu: Whether a ReLU follows.
        axes: The axes of devices of which the batches go together.
    """

    epsilon: float
    relu: bool
    axes: Axes


def normalize(
    x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options, *, axes: Axes = ()
) -> Normalized:
    """See :mod:`truenorm._kernels`; with ``axes``, of the batches of all devices together."""
    if options.correct is not None:  # XLA joins what is done value by value.
        return composite.corrected(partial(normalize, axes=axes), x, gamma, beta, options)
    _, epsilon, mask, moving, relu, add, _ = options
    plan = Plan(epsilon, relu, axes)
    channel = options.axis % x.ndim
    if _is_spread_inside(x, channel):
        gather = partial(synchronized.gathered, axes) if axes else None
        return composite.normalize(x, gamma, beta, options, gather=gather)
    channels = x.shape[channel]
    before, after = math.prod(x.shape[:channel]), math.prod(x.shape[channel + 1 :])
    dtype = statistics_dtype(x.dtype)
    scale, offset = _weights(gamma, beta, channels, dtype)
    rows = x.reshape((before, channels, after) if after != 1 else (before, channels))
    add = None if add is None else add.reshape(rows.shape)
    if mask is None:
        given = synchronized.alike(rows, scale, offset, add)
        output, mean, variance = cast(Any, _normalize(plan, *given))
        count = jnp.asarray(before * after * synchronized.parts(axes), dtype)
    else:
        width = channels if by_channel(mask, channel) else 1
        shape = (*x.shape[:channel], width, *x.shape[channel + 1 :])
        counts = jnp.broadcast_to(jnp.asarray(mask, bool), shape)
        counts = counts.reshape((before, width, after) if after != 1 else (before, width))
        given = (rows, scale, offset, add)
        output, mean, variance, count = _masked(plan, *given, counts, moving)
        count = count if width != 1 else count[0]
    return Normalized(
        output.reshape(x.shape),
        jax.lax.stop_gradient(mean),
        jax.lax.stop_gradient(variance),
        count,
    )


def normalize_ghosts(
    x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options, *, size: int
) -> Normalized:
    """See :mod:`truenorm._kernels`."""
    kernels: dict[str, Any] = {}
    if not any(jax.typeof(x).sharding.spec):  # JAX would refuse to join axes that are divided.
        # What is left, XLA does better at once than one after the other.
        kernels = {"each": normalize, "grouped": _normalize_grouped, "most_calls": 1}
    return ghosts.normalize_ghosts(x, gamma, beta, options, size=size, **kernels)


def _normalize_grouped(
    x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options, *, groups: int
) -> Normalized:
    """Ghost batches without a mask, channels last: see ``ghosts.Grouped``."""
    samples, *inner, width = x.shape
    rows = x.reshape((samples // groups, groups, math.prod(inner), width))
    weights = _weights(gamma, beta, groups * width, statistics_dtype(x.dtype))
    given = synchronized.alike(rows, *weights, None)
    output, *statistics = cast(Any, _normalize(Plan(options.epsilon, options.relu, ()), *given))
    mean, variance = map(jax.lax.stop_gradient, statistics)
    count = jnp.asarray(rows.shape[0] * rows.shape[2], mean.dtype)
    return Normalized(output.reshape(x.shape), mean, variance, count)


def _weights(
    gamma: Vector | None, beta: Vector | None, channels: int, dtype: Any
) -> tuple[Vector, Vector]:
    scale = jnp.ones(channels, dtype) if gamma is None else gamma.astype(dtype)
    offset = jnp.zeros(channels, dtype) if beta is None else beta.astype(dtype)
    return scale, offset


def _is_spread_inside(x: Tensor, channel: int) -> bool:
    """Whether its type divides it among devices along an axis that rows would not begin with.

    JAX would refuse to reshape it: of axes that become one, only the first may be divided.
    """
    spec = jax.typeof(x).sharding.spec
    return any(spec[at] for at in range(1, x.ndim) if at not in (channel, channel + 1))


def normalize_synchronized(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
    *,
    over: Sequence[str] | None = None,
) -> Normalized:
    """See :mod:`truenorm._kernels`; over the axes of devices of these names.

    A program that ``jax.jit`` spreads over devices, as under ``keras.distribution``, sees the whole
    batch. XLA divides the sums: 3 numbers per channel forward (of the mean first, then of what
    rounding took from it and of the variance), 2 backward.
    """
    return normalize(x, gamma, beta, options, axes=synchronized.axes(over))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, add: Tensor | None
) -> tuple[Tensor, Vector, Vector]:
    return _forward(plan, rows, gamma, beta, add)[0]


def _forward(plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, add: Tensor | None) -> Any:
    values = rows.astype(gamma.dtype)
    if native.takes(rows):
        shift, delta, variance = _compiled_moments(values, jax.lax.stop_gradient(rows))
    else:
        shift, delta, variance = _moments_of_all(values, gamma.dtype)
    if plan.axes:
        count = jnp.asarray(1.0 / _share(rows), gamma.dtype)
        _, shift, delta, variance = synchronized.merged(plan.axes, count, shift, delta, variance)
    rstd = jax.lax.rsqrt(variance + plan.epsilon)
    deviations = values - _spread(shift, rows)
    output = closed_form.forward(_ROWS, deviations, delta, rstd, gamma, beta)
    output = (output if add is None else output + add.astype(output.dtype)).astype(rows.dtype)
    if plan.relu:
        output = jnp.where(output < 0, 0, output)  # Not maximum: a NaN stays.
    passed = None if add is None else output > 0 if plan.relu else jnp.array(True)
    return (output, shift + delta, variance), (rows, gamma, beta, passed, shift, delta, rstd)


def _backward(plan: Plan, kept: Any, cotangents: Any) -> Any:
    axes = plan.axes
    rows, gamma, beta, passed, shift, delta, rstd = kept
    gradient = cotangents[0] if passed is None else jnp.where(passed, cotangents[0], 0)
    d_rows, d_gamma, d_beta = closed_form.backward(
        _ROWS,
        gradient.astype(gamma.dtype),
        rows.astype(gamma.dtype) - _spread(shift, rows),
        *(delta, rstd, gamma, beta, _share(rows) / synchronized.parts(axes)),
        relu=plan.relu and passed is None,
        everyones=partial(synchronized.total, axes) if axes else None,
        sums=partial(_compiled_products, rows, shift) if native.takes(rows) else None,
    )
    return d_rows.astype(rows.dtype), d_gamma, d_beta, None if passed is None else gradient


_normalize.defvjp(_forward, _backward)


def _masked(
    plan: Plan,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    add: Tensor | None,
    counts: Tensor,
    moving: Moving | None,
) -> tuple[Tensor, Vector, Vector, Vector]:
    """Ordinary code but for the moments, so that forward mode is defined."""
    # Cast once: what reaches the rows in several ways is added in the wider type.
    values = rows.astype(gamma.dtype)
    count = _count(counts, gamma.dtype)
    shift, delta, variance = _masked_moments(values, jax.lax.stop_gradient(rows), counts, count)
    if plan.axes:
        count, shift, delta, variance = synchronized.merged(
            plan.axes, count, shift, delta, variance
        )
    if moving is not None:  # It normalises where nothing counts.
        delta = jnp.where(count > 0, delta, moving.mean.astype(gamma.dtype) - shift)
        variance = jnp.where(count > 0, variance, moving.variance.astype(gamma.dtype))
    rstd = jax.lax.rsqrt(variance + plan.epsilon)
    if counts.shape[1] != 1:
        rstd = jnp.where(silent(count, 0), 0, rstd)
    output = closed_form.forward(_ROWS, values - _spread(shift, rows), delta, rstd, gamma, beta)
    output = (output if add is None else output + add.astype(output.dtype)).astype(rows.dtype)
    return jax.nn.relu(output) if plan.relu else output, shift + delta, variance, count


@jax.custom_jvp
def _masked_moments(values: Tensor, rows: Tensor, counts: Tensor, count: Vector) -> Any:
    """Those of the values that count; the rows are the same in the dtype of the input.

    The count is given: it would be another sum over devices wherever it is made again.
    """
    # Inside a mapped program the mask may differ between devices where the rows do not.
    if counts.shape[1:] == (1,) and native.takes(rows) and not synchronized.mapped():
        return native.moments(rows, counts[:, 0], dtype=values.dtype, plain=_moments_of_rows)
    return _moments_of_counted(values, counts, count)


def _moments_of_rows(rows: Tensor, counts: Tensor, dtype: Any) -> Any:
    counts = counts[:, None]
    return _moments_of_counted(rows.astype(dtype), counts, _count(counts, dtype))


def _moments_of_counted(values: Tensor, counts: Tensor, count: Vector) -> Any:
    return tuple(closed_form.moments(_ROWS, values, 1.0 / jnp.maximum(count, 1.0), counts))


@_masked_moments.defjvp
def _moving_masked_values(at: Any, tangents: Any) -> Any:
    values, _, counts, count = at
    change = jnp.where(counts, tangents[0], 0)
    moments = _masked_moments(*at)
    return moments, _moments_move(values, change, moments, 1.0 / jnp.maximum(count, 1.0), counts)


@jax.custom_jvp
def _compiled_moments(values: Tensor, rows: Tensor) -> Any:
    return native.moments(rows, dtype=values.dtype, plain=_moments_of_all)


def _moments_of_all(rows: Tensor, dtype: Any) -> Any:
    return tuple(closed_form.moments(_ROWS, rows.astype(dtype), _share(rows)))


@_compiled_moments.defjvp
def _moving_values(at: Any, tangents: Any) -> Any:
    values, rows = at
    moments = _compiled_moments(values, rows)
    return moments, _moments_move(values, tangents[0], moments, _share(rows), True)


def _compiled_products(
    rows: Tensor, shift: Vector, gradient: Tensor, deviations: Tensor, delta: Vector, rstd: Vector
) -> tuple[Vector, Vector]:
    given = (rows, gradient.astype(rows.dtype), shift)
    fixed = (jax.lax.stop_gradient(array) for array in given)
    return _products_of(gradient, deviations, delta, rstd, *fixed)


@jax.custom_jvp
def _products_of(
    gradient: Tensor,
    deviations: Tensor,
    delta: Vector,
    rstd: Vector,
    rows: Tensor,
    narrow: Tensor,
    shift: Vector,
) -> Any:
    """``closed_form.products``; the last three give gradient and deviations, too."""
    del deviations
    arrays = (rows, narrow, shift, delta, rstd)
    return native.products(*arrays, dtype=gradient.dtype, plain=_products_of_rows)


def _products_of_rows(
    rows: Tensor, gradient: Tensor, shift: Vector, delta: Vector, rstd: Vector, dtype: Any
) -> Any:
    deviations = rows.astype(dtype) - _spread(shift, rows)
    return closed_form.products(_ROWS, gradient.astype(dtype), deviations, delta, rstd)


@_products_of.defjvp
def _moving_products(at: Any, tangents: Any) -> Any:
    plain = partial(closed_form.products, _ROWS)
    return _products_of(*at), jax.jvp(plain, at[:4], tangents[:4])[1]


def _moments_move(
    values: Tensor, change: Tensor, moments: Any, share: Scalar, counts: Tensor
) -> tuple[Vector, Vector, Vector]:
    """How the moments change with the values: all of the mean's change is in its correction."""
    shift, delta, _ = moments
    deviations = (values - _spread(shift, values)) - _spread(delta, values)
    of_mean = _total(change) * share
    of_variance = 2 * _total(jnp.where(counts, deviations, 0) * change) * share
    return jnp.zeros_like(shift), of_mean, of_variance


def _count(counts: Tensor, dtype: Any) -> Vector:
    """How many values count in each channel, or in all of them alike."""
    return counts.sum((0, 2)[: counts.ndim - 1], dtype="int32").astype(dtype)


def _share(rows: Tensor) -> float:
    return 1.0 / max(rows.size // max(native.channels(rows), 1), 1)


def _total(rows: Tensor) -> Vector:
    if rows.ndim == 4:
        return rows.sum((0, 2)).reshape(-1)
    # In two steps that XLA does not merge into one: it would add all numbers in sequence.
    return (rows if rows.ndim == 2 else jax.lax.optimization_barrier(rows.sum(2))).sum(0)


def _spread(per_channel: Vector, rows: Tensor) -> Tensor:
    if rows.ndim == 4:
        return per_channel.reshape(rows.shape[1], 1, rows.shape[3])
    return per_channel if rows.ndim == 2 else per_channel[:, None]


def _first(rows: Tensor) -> Scalar | Vector:
    if not composite.is_whole():
        return 0.0
    axes = (0, 2)[: rows.ndim - 1]
    return rows[:1, :, *[slice(1)] * (rows.ndim > 2)].sum(axes).reshape(-1)


_ROWS = closed_form.Rows(_total, _spread, _first)
