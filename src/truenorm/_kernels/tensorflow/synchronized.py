# What it shares with plain.py is theirs alone.
# pyright: reportPrivateUsage=false
r"""TensorFlow: one batch whose parts are those of the replicas of a strategy; one sum each way.

Each replica takes count, mean and variance of its own part. A sum over the replicas, in which each
has a row for itself, gives those of all of them to all, which merge them (``composite.merged``).
Backward the sum is of two numbers per channel, the gradients of gamma and beta; their means over
the whole batch are all that the gradient of a part needs of the others (``closed_form.py``). The
gradients of gamma and beta themselves stay those of the part: strategies add them up.

What lies between the sums is TensorFlow's own operations, compiled by XLA inside a graph, where
sums over replicas cannot be. As a sum, every strategy has it, and TensorFlow its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels import closed_form, composite
from truenorm._kernels.contract import Normalized, Scalar, Tensor, Vector
from truenorm._kernels.tensorflow import plain
from truenorm._kernels.tensorflow.plain import ROWS
from truenorm._kernels.tensorflow.portable import portable

tf: Any = tensorflow


class Whole(NamedTuple):
    """What a part of a batch knows of the whole.

    Args:
        mean: Mean of all replicas' values.
        low: What rounding takes from it.
        variance: Their variance.
        share: One over their number.
    """

    mean: Vector
    low: Vector
    variance: Vector
    share: Scalar


def gather(replica: Any) -> Callable[[Vector], Tensor]:
    """From a vector to those of all replicas, one per row; differentiable."""

    def rows(vector: Vector) -> Tensor:
        own = tf.one_hot(
            replica.replica_id_in_sync_group,
            replica.num_replicas_in_sync,
            *(True, False),
            dtype=tf.bool,
        )
        return _sum(replica, tf.where(own[:, None], vector[None, :], tf.zeros_like(vector)))

    return rows


def _sum(replica: Any, values: Tensor) -> Tensor:
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, values)


def normalize(
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    mask: Tensor | None,
    moving: tuple[Vector, Vector] | None,
    *,
    epsilon: float,
    relu: bool,
    replica: Any,
    correct: Callable[..., tuple[Vector, Vector]] | None,
) -> tuple[Tensor, Vector, Vector, Scalar]:
    """Output, mean and variance of the whole batch, and the number of its values that count.

    Args:
        rows: The part of this replica, (outer, channels) or (outer, channels, inner).
        gamma: The scale, in the dtype of the statistics, as all that follows.
        beta: The offset.
        mask: Which rows count, shape (outer,); None: all.
        moving: Mean and variance that normalise where nothing counts.
        epsilon: Added to the variance.
        relu: Whether a ReLU follows.
        replica: Its context.
        correct: As ``Options.correct``.
    """
    masks = () if mask is None else (mask,)
    kind = (rows.dtype.name, gamma.dtype.name, len(rows.shape))
    steps = _steps(epsilon, relu, *kind, masked=bool(masks), eager=tf.executing_eagerly())
    shift, delta, variance, count = steps.moments(tf.stop_gradient(rows), *masks)
    for vector in (shift, delta, variance):
        vector.set_shape(gamma.shape)
    count, shift, delta, variance = composite.merged(count, shift, delta, variance, gather(replica))
    if moving is not None:
        delta = tf.where(count > 0, delta, moving[0] - shift)
        variance = tf.where(count > 0, variance, moving[1])
    mean = shift + delta
    whole = Whole(mean, (shift - mean) + delta, variance, 1.0 / tf.maximum(count, 1.0))
    if correct is not None:
        gamma, beta = correct(Normalized(None, mean, variance, count), gamma, beta)

    @tf.custom_gradient
    def differentiable_backward(rows: Tensor, gamma: Vector, gradient: Tensor) -> Any:
        (sums,) = steps.products(rows, gamma, beta, gradient, *whole)
        sums.set_shape((2, *gamma.shape))
        means = _sum(replica, sums) * whole.share
        (d_rows,) = steps.gradient(rows, gamma, beta, gradient, *whole, means, *masks)

        def second(*cotangents: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch((rows, gamma, gradient))
                found = _backward_of_values(
                    replica, gradient, rows, gamma, beta, mask, whole, count, epsilon, relu=relu
                )
            return tape.gradient(found, (rows, gamma, gradient), output_gradients=cotangents)

        return (d_rows, sums), second

    @tf.custom_gradient
    def kernel(rows: Tensor, gamma: Vector, beta: Vector) -> Any:
        def first(gradient: Tensor) -> Any:
            d_rows, sums = differentiable_backward(rows, gamma, gradient)
            return d_rows, *tf.unstack(sums, 2)

        (output,) = steps.output(rows, gamma, beta, *whole)
        return output, first

    return kernel(rows, gamma, beta), mean, variance, count


class Steps(NamedTuple):
    """What a replica computes by itself, before and after the sum of each way."""

    moments: Callable[..., Any]
    output: Callable[..., Any]
    products: Callable[..., Any]
    gradient: Callable[..., Any]


@lru_cache(maxsize=64)
def _steps(
    epsilon: float, relu: bool, x_dtype: str, dtype: str, rank: int, *, masked: bool, eager: bool
) -> Steps:
    """The steps for rows of one dtype and rank, whose statistics have a dtype."""
    functions = Steps(
        partial(_moments, dtype),
        partial(_output, epsilon, relu),
        partial(_products, epsilon, relu),
        partial(_gradient, epsilon, relu),
    )
    if eager:
        return functions
    rows, mask = tf.TensorSpec([None] * rank, x_dtype), [tf.TensorSpec([None], tf.bool)] * masked
    scalar, vector, pair = (tf.TensorSpec(shape, dtype) for shape in ([], [None], [2, None]))
    whole = (vector, vector, vector, scalar)
    signatures = (
        (rows, *mask),
        (rows, vector, vector, *whole),
        (rows, vector, vector, rows, *whole),
        (rows, vector, vector, rows, *whole, pair, *mask),
    )
    by_xla = partial(tf.function, jit_compile=True, autograph=False)
    return Steps(
        *(
            portable(by_xla(function, input_signature=signature), function, signature)
            for function, signature in zip(functions, signatures, strict=True)
        )
    )


def _moments(dtype: str, rows: Tensor, *mask: Tensor) -> tuple[Tensor, ...]:
    """The mean as the sum of two, the variance and the count of a part."""
    given = mask[0] if mask else None
    count = plain._count(rows, given, dtype)
    share, counts = plain._share(count), plain._spread_mask(given, rows)
    return *plain.moments_of_values(tf.cast(rows, dtype), share, counts), count


def _output(
    epsilon: float, relu: bool, rows: Tensor, gamma: Vector, beta: Vector, *whole: Tensor
) -> tuple[Tensor]:
    deviations, low, rstd = _normalizing(epsilon, rows, Whole(*whole))
    output = closed_form.forward(ROWS, deviations, low, rstd, gamma, beta)
    return (tf.cast(tf.nn.relu(output) if relu else output, rows.dtype),)


def _products(
    epsilon: float,
    relu: bool,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    gradient: Tensor,
    *whole: Tensor,
) -> tuple[Tensor]:
    """The gradients of gamma and beta from a part."""
    deviations, low, rstd = _normalizing(epsilon, rows, Whole(*whole))
    gradient = tf.cast(gradient, gamma.dtype)
    if relu:
        gradient = closed_form.rectified(ROWS, gradient, deviations, low, rstd, gamma, beta)
    return (tf.stack(closed_form.products(ROWS, gradient, deviations, low, rstd)),)


def _gradient(
    epsilon: float,
    relu: bool,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    gradient: Tensor,
    *others: Tensor,
) -> tuple[Tensor]:
    """The gradient of the rows; the others are a :class:`Whole`, two means, perhaps a mask."""
    whole, means, mask = Whole(*others[:4]), others[4], others[5:]
    of_gamma, of_beta = tf.unstack(means)
    deviations, low, rstd = _normalizing(epsilon, rows, whole)
    gradient = tf.cast(gradient, gamma.dtype)
    if relu:
        gradient = closed_form.rectified(ROWS, gradient, deviations, low, rstd, gamma, beta)
    counts = plain._spread_mask(mask[0] if mask else None, rows)
    d_rows = closed_form.gradient_of_values(
        ROWS, gradient, deviations, low, rstd, gamma, of_gamma, of_beta, counts
    )
    return (tf.cast(d_rows, rows.dtype),)


def _normalizing(epsilon: float, rows: Tensor, whole: Whole) -> tuple[Tensor, Vector, Vector]:
    """Deviations from the mean, what rounding took from it, and rstd."""
    deviations = tf.cast(rows, whole.mean.dtype) - ROWS.spread(whole.mean, rows)
    return deviations, whole.low, tf.math.rsqrt(whole.variance + epsilon)


def _backward_of_values(
    replica: Any,
    gradient: Tensor,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    mask: Tensor | None,
    whole: Whole,
    count: Scalar,
    epsilon: float,
    *,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Both results of the backward pass as functions of the values, sums over replicas included."""
    everywhere = closed_form.Rows(lambda terms: _sum(replica, ROWS.total(terms)), ROWS.spread)
    counts = plain._spread_mask(mask, rows)
    values, gradient = (tf.cast(tensor, gamma.dtype) for tensor in (rows, gradient))
    _, low, variance = closed_form.moments(everywhere, values, whole.share, counts, whole.mean)
    rstd = tf.math.rsqrt(tf.where(count > 0, variance, whole.variance) + epsilon)
    deviations = values - ROWS.spread(whole.mean, rows)
    if relu:
        gradient = closed_form.rectified(ROWS, gradient, deviations, low, rstd, gamma, beta)
    through = (gradient, deviations, low, rstd)
    of_gamma, of_beta = closed_form.products(everywhere, *through)
    means = (of_gamma * whole.share, of_beta * whole.share)
    d_rows = closed_form.gradient_of_values(ROWS, *through, gamma, *means, counts)
    return tf.cast(d_rows, rows.dtype), tf.stack(closed_form.products(ROWS, *through))
