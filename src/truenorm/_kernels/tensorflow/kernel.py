r"""TensorFlow: the compiled passes where they can be, else a closed-form backward by XLA.

The latter is for two-dimensional rows: XLA on a CPU reduces
the first axis of a matrix ten times faster than three axes of a tensor of rank 4. Forward and
backward are each one compiled function, inside a graph that is compiled as a whole
(``jit_compile=True``) and inside one that is not. XLA compiles once per shape of the input.

TensorFlow's own fused op sums in sequence (an error 10 times larger on 100,000 values), has no
float64, and becomes E[x²] − E[x]² (NaN where the mean is large) inside a compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels import closed_form, composite
from truenorm._kernels.contract import (
    Moving,
    Normalized,
    Options,
    Scalar,
    Tensor,
    Vector,
    statistics_dtype,
)
from truenorm._kernels.masks import by_channel
from truenorm._kernels.tensorflow import native

tf: Any = tensorflow


def normalize(x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options) -> Normalized:
    """See :mod:`truenorm._kernels`. Masks take the compiled passes, or else the composite."""
    axis, epsilon, mask, moving, relu = options
    x = tf.convert_to_tensor(x)
    channel = axis % len(x.shape)
    channels, last = x.shape[channel], channel == len(x.shape) - 1
    dtype = statistics_dtype(x.dtype)
    compiled = native.takes(x)
    takes_moving = compiled and _same(dtype, moving)
    plain = mask is None or (takes_moving and last and not by_channel(mask, channel))
    if not plain:
        return composite.normalize(x, gamma, beta, options)
    scale = tf.ones(channels, dtype) if gamma is None else tf.cast(gamma, dtype)
    offset = tf.zeros(channels, dtype) if beta is None else tf.cast(beta, dtype)
    shape = tf.shape(x)
    after = 1 if last else tf.reduce_prod(shape[channel + 1 :])
    before = tf.reduce_prod(shape[:channel])
    flat = last and not compiled
    rows = tf.reshape(x, (before, channels) if flat else (before, channels, after))
    counts = tf.zeros(0, tf.bool)  # of size 0: all
    if mask is not None:
        counts = tf.reshape(tf.broadcast_to(tf.squeeze(mask, -1), shape[:-1]), [-1])
    moves, momentum = (), None
    if moving is not None and takes_moving:
        moves, momentum = moving[:2], moving.momentum
    kernel = _kernel(
        _compiled if compiled else _by_xla,
        *(epsilon, relu, 2 if flat else 3, x.dtype.name, dtype),
        native.Step(1.0 if momentum is None else momentum, moving is not None and moving.unbiased),
    )
    output, *statistics = kernel(rows, scale, offset, counts, *moves)
    output = tf.reshape(output, shape)
    output.set_shape(x.shape)
    for vector in statistics:
        vector.set_shape((channels,))
    mean, variance, *moved = (tf.stop_gradient(vector) for vector in statistics)
    count = before * after if mask is None else tf.math.count_nonzero(counts)
    return Normalized(
        *(output, mean, variance, tf.cast(count, dtype)),
        moved=None if momentum is None else tuple(moved),
    )


def _same(dtype: str, moving: Moving | None) -> bool:
    """Whether the moving statistics, if there are any, are of this dtype."""
    return moving is None or moving.mean.dtype == moving.variance.dtype == dtype


def normalize_synchronized(
    x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options
) -> Normalized:
    """See :mod:`truenorm._kernels`: over the replicas of the ``tf.distribute`` strategy."""
    replica = tf.distribute.get_replica_context()
    replicas = getattr(replica, "num_replicas_in_sync", 1)  # None between replicas
    if replicas == 1:
        return normalize(x, gamma, beta, options)

    def gather(vector: Vector) -> Tensor:
        # As a sum, every strategy has it, and TensorFlow its gradient.
        own = tf.one_hot(replica.replica_id_in_sync_group, replicas, True, False, dtype=tf.bool)
        rows = tf.where(own[:, None], vector[None, :], tf.zeros_like(vector))
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, rows)

    return composite.normalize(x, gamma, beta, options, gather=gather)


@lru_cache(maxsize=64)
def _kernel(
    passes: Callable[..., Any],
    epsilon: float,
    relu: bool,
    rank: int,
    x_dtype: str,
    dtype: str,
    step: native.Step,
) -> Callable[..., Any]:
    """The kernel for one epsilon, with ReLU or not, one rank of the rows and pair of dtypes."""
    forward, backward = passes(epsilon, relu, rank, x_dtype, dtype, step)

    @tf.custom_gradient
    def differentiable_backward(
        gradient: Tensor, rows: Tensor, gamma: Vector, beta: Vector, mask: Tensor, kept: Tensor
    ) -> Any:
        def second(*cotangents: Any) -> Any:
            given = (gradient, rows, gamma, beta, mask, kept)
            return (*_second(*given, epsilon, relu, cotangents), None, None, None)

        return backward(gradient, rows, gamma, beta, mask, kept), second

    @tf.custom_gradient
    def kernel(rows: Tensor, gamma: Vector, beta: Vector, mask: Tensor, *moving: Vector) -> Any:
        output, kept = forward(rows, gamma, beta, mask, *moving)

        def first(gradient: Tensor, *_: Any) -> Any:
            found = differentiable_backward(gradient, rows, gamma, beta, mask, kept)
            return *found, None, *[None] * len(moving)

        mean, variance, _, _, *moved = tf.unstack(kept)
        return (output, mean, variance, *moved), first

    return kernel


def _compiled(
    epsilon: float,
    relu: bool,
    rank: int,
    x_dtype: str,
    dtype: str,
    step: native.Step,
) -> tuple[Any, Any]:
    """Forward and backward by the compiled passes; what is kept are numbers per channel."""
    del rank, x_dtype, dtype  # They take any.
    return (
        partial(native.forward, epsilon=epsilon, relu=relu, step=step),
        partial(native.backward, epsilon=epsilon, relu=relu),
    )


def _by_xla(
    epsilon: float, relu: bool, rank: int, x_dtype: str, dtype: str, step: native.Step
) -> tuple[Any, Any]:
    """Forward and backward, traced once each for any size, so that new shapes never retrace."""
    del step
    rows_spec = tf.TensorSpec([None] * rank, x_dtype)
    channel_spec = tf.TensorSpec([None], dtype)
    kept_spec = tf.TensorSpec([4, None], dtype)
    compiled = partial(tf.function, jit_compile=True, autograph=False)
    run_forward = compiled(
        partial(_forward, epsilon, relu), input_signature=(rows_spec, channel_spec, channel_spec)
    )
    run_backward = compiled(
        partial(_backward, relu),
        input_signature=(rows_spec, rows_spec, channel_spec, channel_spec, kept_spec),
    )

    def forward(rows: Tensor, gamma: Vector, beta: Vector, _: Tensor) -> Any:
        return run_forward(rows, gamma, beta)

    def backward(
        gradient: Tensor, rows: Tensor, gamma: Vector, beta: Vector, _: Tensor, kept: Tensor
    ) -> Any:
        return run_backward(gradient, rows, gamma, beta, kept)

    return forward, backward


def _forward(
    epsilon: float, relu: bool, rows: Tensor, gamma: Vector, beta: Vector
) -> tuple[Tensor, Tensor]:
    values = tf.cast(rows, gamma.dtype)
    shift, delta, variance = closed_form.moments(_ROWS, values, _share(rows, gamma.dtype))
    rstd = tf.math.rsqrt(variance + epsilon)
    output = closed_form.forward(_ROWS, values - _spread(shift, rows), delta, rstd, gamma, beta)
    output = tf.cast(tf.nn.relu(output) if relu else output, rows.dtype)
    mean = shift + delta
    low = (shift - mean) + delta  # what rounding takes from the mean
    return output, tf.stack([mean, variance, low, rstd])


def _backward(
    relu: bool, gradient: Tensor, rows: Tensor, gamma: Vector, beta: Vector, kept: Tensor
) -> tuple[Tensor, Vector, Vector]:
    mean, _, low, rstd = tf.unstack(kept)
    d_rows, *sums = closed_form.backward(
        _ROWS,
        tf.cast(gradient, gamma.dtype),
        tf.cast(rows, gamma.dtype) - _spread(mean, rows),
        *(low, rstd, gamma, beta, _share(rows, gamma.dtype)),
        relu=relu,
    )
    return tf.cast(d_rows, rows.dtype), *sums


def _second(
    gradient: Tensor,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    mask: Tensor,
    kept: Tensor,
    epsilon: Scalar,
    relu: bool,
    cotangents: Any,
) -> Any:
    """The derivatives of the backward pass with respect to gradient, rows and gamma."""
    counts, count = None, tf.size(rows) // tf.maximum(tf.size(gamma), 1)
    if mask.shape[0] != 0:
        counts, count = mask[:, None, None], tf.math.count_nonzero(mask)
    with tf.GradientTape() as tape:
        tape.watch((gradient, rows, gamma))
        d_rows, d_gamma, d_beta = closed_form.backward_of_values(
            _ROWS,
            tf.cast(gradient, gamma.dtype),
            tf.cast(rows, gamma.dtype),
            gamma,
            beta,
            shift=kept[0],
            fallback=kept[1],
            count=tf.cast(count, gamma.dtype),
            epsilon=epsilon,
            counts=counts,
            relu=relu,
        )
        first = (tf.cast(d_rows, rows.dtype), d_gamma, d_beta)
    return tape.gradient(first, (gradient, rows, gamma), output_gradients=cotangents)


@tf.RegisterGradient("TruenormBackward")
def _gradient_of_backward(op: Any, of_rows: Any, of_sums: Any) -> Any:
    rows, gamma, beta, kept, gradient, mask, epsilon = op.inputs
    cotangents = (of_rows, *tf.unstack(of_sums))
    epsilon = tf.cast(epsilon, gamma.dtype)
    given = (gradient, rows, gamma, beta, mask, kept)
    seconds = _second(*given, epsilon, op.get_attr("relu"), cotangents)
    return seconds[1], seconds[2], None, None, seconds[0], None, None


def _share(rows: Tensor, dtype: Any) -> Scalar:
    shape = tf.shape(rows)
    count = shape[0] if len(rows.shape) == 2 else shape[0] * shape[2]
    return 1.0 / tf.cast(tf.maximum(count, 1), dtype)


def _total(rows: Tensor) -> Vector:
    if len(rows.shape) == 3:
        # In two steps that XLA does not merge into one: it would add all numbers in sequence.
        sums = tf.reduce_sum(rows, 2)
        rows = tf.where(tf.math.is_nan(sums), tf.constant(math.nan, sums.dtype), sums)
    return tf.reduce_sum(rows, 0)


def _spread(per_channel: Vector, rows: Tensor) -> Tensor:
    return per_channel if len(rows.shape) == 2 else per_channel[:, None]


_ROWS = closed_form.Rows(_total, _spread)
