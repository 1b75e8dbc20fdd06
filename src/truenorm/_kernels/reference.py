r"""Batch normalization in plain NumPy float64: the algorithm to read, and the oracle of the tests.

Forward (Ioffe and Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift", algorithm 1), per channel, over the *n* values that count
(:math:`w_i = 1`; a mask makes :math:`w_i = 0`):

.. math:: \mu = \tfrac1n \sum_i w_i x_i, \qquad
          \sigma^2 = \tfrac1n \sum_i w_i (x_i - \mu)^2, \qquad
          \hat x_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
          y_i = \gamma \hat x_i + \beta .

Backward (section 3 of the same paper): the loss reaches :math:`x_i` directly, through
:math:`\sigma^2` and through :math:`\mu`. With :math:`g_i = \partial\ell / \partial y_i` and
:math:`r = 1 / \sqrt{\sigma^2 + \epsilon}`

.. math:: \frac{\partial\ell}{\partial\beta} = \sum_i g_i, \qquad
          \frac{\partial\ell}{\partial\gamma} = \sum_i g_i \hat x_i, \qquad
          \frac{\partial\ell}{\partial\sigma^2}
            = -\tfrac12 \gamma r^3 \sum_i g_i (x_i - \mu), \qquad
          \frac{\partial\ell}{\partial\mu} = -\gamma r \sum_i g_i,

.. math:: \frac{\partial\ell}{\partial x_i} = \gamma r g_i
            + w_i \frac{2 (x_i - \mu)}{n} \frac{\partial\ell}{\partial\sigma^2}
            + \frac{w_i}{n} \frac{\partial\ell}{\partial\mu} .

(The paper's second term of :math:`\partial\ell / \partial\mu` holds the sum of the deviations,
which is zero.) Values that do not count are normalised all the same: their loss reaches the values
that do, through the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truenorm._kernels.masks import lacking

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Forward:
    """Output and statistics of one training batch, and how many values of each channel counted."""

    output: Array
    mean: Array
    variance: Array
    count: Array


@dataclass(frozen=True)
class Gradients:
    """Gradients of a loss; those of gamma and beta are as if both existed."""

    x: Array
    gamma: Array
    beta: Array


def forward(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
    mask: Any = None,
    fallback: tuple[Any, Any] | None = None,
) -> Forward:
    """Normalise with the batch's statistics, or with ``fallback`` if no value counts.

    A mask is Keras's, or in the shape of ``x`` without its channel axis, or in that of ``x``: see
    ``masks.py``.
    """
    rows, weights = _rows(x, axis, mask)
    count = weights.sum(axis=0)
    share = 1 / np.maximum(count, 1)
    mean = np.where(weights > 0, rows, 0).sum(axis=0) * share
    variance = np.square(np.where(weights > 0, rows - mean, 0)).sum(axis=0) * share
    if fallback is not None:
        mean, variance = (
            np.where(count > 0, own, np.asarray(given, np.float64))
            for own, given in zip((mean, variance), fallback, strict=True)
        )
    # A channel without a value, in a batch that has some, gives beta.
    spread = np.where((count == 0) & count.any(), np.inf, variance)
    output = infer(x, mean, spread, gamma, beta, axis=axis, epsilon=epsilon)
    return Forward(output, mean, variance, count)


def backward(
    gradient: Any,
    x: Any,
    gamma: Any = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
    mask: Any = None,
    fallback: tuple[Any, Any] | None = None,
) -> Gradients:
    """Gradients of a loss whose gradient with respect to the output is ``gradient``."""
    rows, weights = _rows(x, axis, mask)
    g, _ = _rows(gradient, axis, None)
    batch = forward(x, axis=axis, epsilon=epsilon, mask=mask, fallback=fallback)
    mean, variance, count = batch.mean, batch.variance, batch.count
    r = np.where((count == 0) & count.any(), 0, 1 / np.sqrt(variance + epsilon))
    scale = r if gamma is None else r * np.asarray(gamma, np.float64)
    deviations = rows - mean
    dx = scale * g
    share = 1 / np.maximum(count, 1)
    d_variance = -0.5 * scale * r**2 * (g * deviations).sum(axis=0)
    d_mean = -scale * g.sum(axis=0)
    through = 2 * deviations * share * d_variance + d_mean * share
    dx = dx + np.where(weights > 0, through, 0)
    return Gradients(
        _unrows(dx, x, axis), (g * deviations).sum(axis=0) * r, np.asarray(g.sum(axis=0))
    )


def infer(
    x: Any,
    mean: Any,
    variance: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
) -> Array:
    """Normalise with given statistics: the inference form, and the last step of training's."""
    rows, _ = _rows(x, axis, None)
    output = (rows - np.asarray(mean, np.float64)) / np.sqrt(
        np.asarray(variance, np.float64) + epsilon
    )
    if gamma is not None:
        output = output * np.asarray(gamma, np.float64)
    if beta is not None:
        output = output + np.asarray(beta, np.float64)
    return _unrows(output, x, axis)


def moving(old: Any, batch: Any, momentum: float) -> Array:
    """One step of the moving average: ``momentum`` is the weight of the old statistics."""
    return momentum * np.asarray(old, np.float64) + (1 - momentum) * np.asarray(batch, np.float64)


def _rows(x: Any, axis: int, mask: Any) -> tuple[Array, Array]:
    """The values as (n, channels), and in the same shape whether each of them counts."""
    values = np.asarray(x, np.float64)
    weights = np.ones_like(values)
    if mask is not None:
        counts = np.asarray(mask, bool)
        if counts.ndim < values.ndim:
            counts = np.expand_dims(counts, lacking(counts.shape, values.shape, axis)[0])
        weights *= counts
    last = (np.moveaxis(array, axis, -1) for array in (values, weights))
    rows, weights = (array.reshape(-1, array.shape[-1]) for array in last)
    return rows, weights


def _unrows(rows: Array, x: Any, axis: int) -> Array:
    last = np.moveaxis(np.asarray(x, np.float64), axis, -1).shape
    return np.moveaxis(rows.reshape(last), -1, axis)
