r"""JAX: compiled moments, the closed-form backward over two-dimensional rows; XLA does the rest.

With :math:`\hat x` normalised and :math:`g = \partial\ell / \partial y`, the three ways in which
the loss reaches x (see ``_reference.py``) add up to

.. math:: \frac{\partial\ell}{\partial x_i} = \gamma r \Bigl( g_i - \tfrac1n \sum_j g_j
          - \hat x_i \tfrac1n \sum_j g_j \hat x_j \Bigr) .

Its two sums are the gradients of beta and gamma. Only x, the mean (as shift and correction, see
``_composite.py``) and rstd are kept. JAX differentiates both rules as ordinary code, so reverse
mode, and forward over reverse (``jax.hessian``), are right to any order. Forward mode alone
(``jax.jvp``, ``jax.jacfwd`` of the layer in training mode) is not defined by a closed-form
backward: with a mask, also one that is true everywhere, JAX differentiates the forward pass, around
the moments, whose rule stands here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import jax
from jax import numpy as jnp

from truenorm._kernels.contract import Moving, Normalized, statistics_dtype
from truenorm._kernels.jax import native


def normalize(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int,
    epsilon: float,
    mask: Any = None,
    moving: Moving | None = None,
    relu: bool = False,
) -> Normalized:
    """See :mod:`truenorm._kernels`."""
    channel = axis % x.ndim
    channels = x.shape[channel]
    before, after = math.prod(x.shape[:channel]), math.prod(x.shape[channel + 1 :])
    dtype = statistics_dtype(x.dtype)
    scale = jnp.ones(channels, dtype) if gamma is None else gamma.astype(dtype)
    offset = jnp.zeros(channels, dtype) if beta is None else beta.astype(dtype)
    rows = x.reshape((before, channels, after) if after != 1 else (before, channels))
    if mask is None:
        output, mean, variance = cast(Any, _normalize(epsilon, relu, rows, scale, offset))
        count = jnp.asarray(before * after, dtype)
    else:
        shape = x.shape[:channel] + x.shape[channel + 1 :]
        counts = jnp.broadcast_to(jnp.asarray(mask, bool), shape)
        counts = counts.reshape((before, 1, after) if after != 1 else (before, 1))
        output, mean, variance = _masked(epsilon, relu, rows, scale, offset, counts, moving)
        count = counts.sum(dtype=dtype)
    return Normalized(
        output.reshape(x.shape),
        jax.lax.stop_gradient(mean),
        jax.lax.stop_gradient(variance),
        count,
    )


normalize_synchronized = normalize
"""The same: a program that ``keras.distribution`` spreads over devices sees the whole batch."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(epsilon: float, relu: bool, rows: Any, gamma: Any, beta: Any) -> Any:
    return _forward(epsilon, relu, rows, gamma, beta)[0]


def _forward(epsilon: float, relu: bool, rows: Any, gamma: Any, beta: Any) -> Any:
    values = rows.astype(gamma.dtype)
    if native.takes(rows):
        shift, delta, variance = _compiled_moments(rows, gamma.dtype)
        deviations = values - _spread(shift, rows)
    else:
        share = _share(rows)
        shift = jax.lax.stop_gradient(_total(values) * share)
        shift = jnp.where(jnp.isfinite(shift), shift, 0)  # see _composite.py
        deviations = values - _spread(shift, rows)
        delta = _total(deviations) * share
        variance = jnp.maximum(_total(jnp.square(deviations)) * share - jnp.square(delta), 0.0)
    rstd = jax.lax.rsqrt(variance + epsilon)
    scale = rstd * gamma
    output = deviations * _spread(scale, rows) + _spread(beta - delta * scale, rows)
    output = output.astype(rows.dtype)
    if relu:
        output = jnp.where(output < 0, 0, output)  # Not maximum: a NaN stays.
    kept = (rows, gamma, shift, delta, rstd, output if relu else None)
    return (output, shift + delta, variance), kept


def _backward(epsilon: float, relu: bool, kept: Any, cotangents: Any) -> Any:
    del epsilon  # It is in rstd.
    rows, gamma, shift, delta, rstd, output = kept
    gradient = cotangents[0].astype(gamma.dtype)
    if relu:
        gradient = jnp.where(output > 0, gradient, 0)
    share = _share(rows)
    deviations = rows.astype(gamma.dtype) - _spread(shift, rows)
    d_beta = _total(gradient)
    d_gamma = (_total(gradient * deviations) - delta * d_beta) * rstd
    # What is the same for all values of a channel is computed once: dx = g scale + d slope + level.
    scale, slope = gamma * rstd, -gamma * jnp.square(rstd) * d_gamma * share
    level = -scale * d_beta * share - slope * delta
    d_rows = gradient * _spread(scale, rows)
    d_rows = d_rows + (deviations * _spread(slope, rows) + _spread(level, rows))
    return d_rows.astype(rows.dtype), d_gamma, d_beta


_normalize.defvjp(_forward, _backward)


def _masked(
    epsilon: float,
    relu: bool,
    rows: Any,
    gamma: Any,
    beta: Any,
    counts: Any,
    moving: Moving | None,
) -> Any:
    """Ordinary code but for the moments, so that forward mode is defined."""
    shift, delta, variance = cast(Any, _masked_moments(rows, counts, gamma.dtype))
    if moving is not None:  # It normalises where nothing counts.
        some = counts.any()
        delta = jnp.where(some, delta, moving.mean.astype(gamma.dtype) - shift)
        variance = jnp.where(some, variance, moving.variance.astype(gamma.dtype))
    scale = jax.lax.rsqrt(variance + epsilon) * gamma
    deviations = rows.astype(gamma.dtype) - _spread(shift, rows)
    output = deviations * _spread(scale, rows) + _spread(beta - delta * scale, rows)
    output = output.astype(rows.dtype)
    return jax.nn.relu(output) if relu else output, shift + delta, variance


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _masked_moments(rows: Any, counts: Any, dtype: Any) -> Any:
    if rows.ndim == 2 and native.takes(rows):
        return native.moments(rows, counts[:, 0], dtype=dtype)
    share = 1.0 / jnp.maximum(counts.sum(dtype=dtype), 1.0)
    values = rows.astype(dtype)
    shift = _total(jnp.where(counts, values, 0)) * share
    shift = jnp.where(jnp.isfinite(shift), shift, 0)  # see _composite.py
    deviations = jnp.where(counts, values - _spread(shift, rows), 0)
    delta = _total(deviations) * share
    variance = jnp.maximum(_total(jnp.square(deviations)) * share - jnp.square(delta), 0.0)
    return shift, delta, variance


@_masked_moments.defjvp
def _moving_masked_rows(dtype: Any, at: Any, tangents: Any) -> Any:
    rows, counts = at
    change = jnp.where(counts, tangents[0].astype(dtype), 0)
    share = 1.0 / jnp.maximum(counts.sum(dtype=dtype), 1.0)
    moments = cast(Any, _masked_moments(rows, counts, dtype))
    return moments, _moments_move(rows, change, moments, share, counts)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _compiled_moments(rows: Any, dtype: Any) -> Any:
    return native.moments(rows, dtype=dtype)


@_compiled_moments.defjvp
def _moving_rows(dtype: Any, at: Any, tangents: Any) -> Any:
    rows, change = at[0], tangents[0].astype(dtype)
    moments = _compiled_moments(rows, dtype)
    return moments, _moments_move(rows, change, moments, _share(rows), True)


def _moments_move(rows: Any, change: Any, moments: Any, share: Any, counts: Any) -> Any:
    """How the moments change with the rows: all of the mean's change is in its correction."""
    shift, delta, _ = moments
    deviations = (rows.astype(change.dtype) - _spread(shift, rows)) - _spread(delta, rows)
    of_mean = _total(change) * share
    of_variance = 2 * _total(jnp.where(counts, deviations, 0) * change) * share
    return jnp.zeros_like(shift), of_mean, of_variance


def _share(rows: Any) -> float:
    return 1.0 / max(rows.size // max(rows.shape[1], 1), 1)


def _total(rows: Any) -> Any:
    # In two steps that XLA does not merge into one: it would add all numbers in sequence.
    return (rows if rows.ndim == 2 else jax.lax.optimization_barrier(rows.sum(2))).sum(0)


def _spread(per_channel: Any, rows: Any) -> Any:
    return per_channel if rows.ndim == 2 else per_channel[:, None]
