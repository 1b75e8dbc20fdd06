r"""TensorFlow: the compiled passes where they can be, else a closed-form backward by XLA.

The equation is that of ``_jax.py``. The latter is for two-dimensional rows: XLA on a CPU reduces
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

from truenorm._kernels import composite
from truenorm._kernels.contract import Moving, Normalized, statistics_dtype
from truenorm._kernels.tensorflow import native

tf: Any = tensorflow


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
    """See :mod:`truenorm._kernels`. Masks take the compiled passes, or else the composite."""
    x = tf.convert_to_tensor(x)
    channel = axis % len(x.shape)
    channels, last = x.shape[channel], channel == len(x.shape) - 1
    dtype = statistics_dtype(x.dtype)
    compiled = native.takes(x)
    takes_moving = compiled and _same(dtype, moving)
    if mask is not None and not (takes_moving and last):
        return composite.normalize(
            x, gamma, beta, axis=axis, epsilon=epsilon, mask=mask, moving=moving, relu=relu
        )
    scale = tf.ones(channels, dtype) if gamma is None else tf.cast(gamma, dtype)
    offset = tf.zeros(channels, dtype) if beta is None else tf.cast(beta, dtype)
    shape = tf.shape(x)
    after = 1 if last else tf.reduce_prod(shape[channel + 1 :])
    before = tf.reduce_prod(shape[:channel])
    flat = last and not compiled
    rows = tf.reshape(x, (before, channels) if flat else (before, channels, after))
    counts = tf.zeros(0, tf.bool)  # of size 0: all
    if mask is not None:
        counts = tf.reshape(tf.broadcast_to(tf.cast(mask, tf.bool), shape[:-1]), [-1])
    moves, momentum = (), None
    if moving is not None and takes_moving:
        moves, momentum = moving[:2], moving.momentum
    kernel = _kernel(
        _compiled if compiled else _by_xla,
        *(epsilon, relu, 2 if flat else 3, x.dtype.name, dtype),
        (1.0 if momentum is None else momentum, moving is not None and moving.unbiased),
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
    x: Any, gamma: Any = None, beta: Any = None, **options: Any
) -> Normalized:
    """See :mod:`truenorm._kernels`: over the replicas of the ``tf.distribute`` strategy."""
    replica = tf.distribute.get_replica_context()
    replicas = getattr(replica, "num_replicas_in_sync", 1)  # None between replicas
    if replicas == 1:
        return normalize(x, gamma, beta, **options)

    def gather(vector: Any) -> Any:
        # As a sum, every strategy has it, and TensorFlow its gradient.
        own = tf.one_hot(replica.replica_id_in_sync_group, replicas, True, False, dtype=tf.bool)
        rows = tf.where(own[:, None], vector[None, :], tf.zeros_like(vector))
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, rows)

    return composite.normalize(x, gamma, beta, gather=gather, **options)


@lru_cache(maxsize=64)
def _kernel(
    passes: Callable[..., Any],
    epsilon: float,
    relu: bool,
    rank: int,
    x_dtype: str,
    dtype: str,
    how: native.How,
) -> Callable[..., Any]:
    """The kernel for one epsilon, with ReLU or not, one rank of the rows and pair of dtypes."""
    forward, backward = passes(epsilon, relu, rank, x_dtype, dtype, how)

    @tf.custom_gradient
    def differentiable_backward(
        gradient: Any, rows: Any, gamma: Any, beta: Any, mask: Any, *kept: Any
    ) -> Any:
        def second(*cotangents: Any) -> Any:
            given = (gradient, rows, gamma, beta, mask, kept[0])
            seconds = _second(*given, epsilon, relu, cotangents)
            return (*seconds, None, None, *[None] * len(kept))

        return backward(gradient, rows, gamma, beta, mask, *kept), second

    @tf.custom_gradient
    def kernel(rows: Any, gamma: Any, beta: Any, mask: Any, *moving: Any) -> Any:
        output, statistics, kept = forward(rows, gamma, beta, mask, *moving)

        def first(gradient: Any, *_: Any) -> Any:
            found = differentiable_backward(gradient, rows, gamma, beta, mask, *kept)
            return *found, None, *[None] * len(moving)

        return (output, *statistics), first

    return kernel


def _compiled(
    epsilon: float,
    relu: bool,
    rank: int,
    x_dtype: str,
    dtype: str,
    how: native.How,
) -> tuple[Any, Any]:
    """Forward and backward by the compiled passes; what is kept are numbers per channel."""
    del rank, x_dtype, dtype  # They take any.

    def forward(*given: Any) -> Any:
        output, kept = native.forward(*given, epsilon=epsilon, relu=relu, how=how)
        mean, variance, _, _, *moved = tf.unstack(kept)
        return output, (mean, variance, *moved), (kept,)

    def backward(gradient: Any, *given: Any) -> Any:
        return native.backward(gradient, *given, epsilon=epsilon, relu=relu)

    return forward, backward


def _by_xla(
    epsilon: float, relu: bool, rank: int, x_dtype: str, dtype: str, how: native.How
) -> tuple[Any, Any]:
    """Forward and backward, traced once each for any size, so that new shapes never retrace."""
    del how
    rows_spec = tf.TensorSpec([None] * rank, x_dtype)
    channel_spec = tf.TensorSpec([None], dtype)
    compiled = partial(tf.function, jit_compile=True, autograph=False)
    run_forward = compiled(
        _forward(epsilon, dtype, relu), input_signature=(rows_spec, channel_spec, channel_spec)
    )
    run_backward = compiled(
        _backward,
        input_signature=(rows_spec, rows_spec, *[channel_spec] * 4, *[rows_spec] * relu),
    )

    def forward(rows: Any, gamma: Any, beta: Any, _: Any) -> Any:
        output, shift, delta, variance, rstd = run_forward(rows, gamma, beta)
        return output, (shift + delta, variance), (shift, delta, rstd, *[output] * relu)

    def backward(gradient: Any, rows: Any, gamma: Any, _: Any, __: Any, *kept: Any) -> Any:
        return run_backward(gradient, rows, gamma, *kept)

    return forward, backward


def _second(
    gradient: Any,
    rows: Any,
    gamma: Any,
    beta: Any,
    mask: Any,
    kept: Any,
    epsilon: Any,
    relu: bool,
    cotangents: Any,
) -> Any:
    """The derivatives of the backward pass with respect to gradient, rows and gamma."""
    # The statistics depend on the rows, which their captured values would hide.
    with tf.GradientTape() as tape:
        tape.watch((gradient, rows, gamma))
        if mask.shape[0] == 0:
            forward = _forward(epsilon, gamma.dtype, relu)
            output, shift, delta, _, rstd = forward(rows, gamma, beta)
            first = _backward(gradient, rows, gamma, shift, delta, rstd, *[output] * relu)
        else:
            first = _masked_backward(gradient, rows, gamma, beta, mask, kept, epsilon, relu)
    return tape.gradient(first, (gradient, rows, gamma), output_gradients=cotangents)


@tf.RegisterGradient("TruenormBackward")
def _gradient_of_backward(op: Any, of_rows: Any, of_sums: Any) -> Any:
    rows, gamma, beta, kept, gradient, mask, epsilon = op.inputs
    cotangents = (of_rows, *tf.unstack(of_sums))
    epsilon = tf.cast(epsilon, gamma.dtype)
    given = (gradient, rows, gamma, beta, mask, kept)
    seconds = _second(*given, epsilon, op.get_attr("relu"), cotangents)
    return seconds[1], seconds[2], None, None, seconds[0], None, None


def _forward(epsilon: Any, dtype: str, relu: bool) -> Callable[..., Any]:
    def forward(rows: Any, gamma: Any, beta: Any) -> Any:
        values = tf.cast(rows, dtype)
        share = _share(rows, dtype)
        shift = tf.stop_gradient(_total(values) * share)
        shift = tf.where(tf.math.is_finite(shift), shift, 0.0)  # see _composite.py
        deviations = values - _spread(shift, rows)
        delta = _total(deviations) * share
        variance = tf.maximum(_total(tf.square(deviations)) * share - tf.square(delta), 0.0)
        rstd = tf.math.rsqrt(variance + epsilon)
        scale = rstd * gamma
        output = deviations * _spread(scale, rows) + _spread(beta - delta * scale, rows)
        output = tf.cast(output, rows.dtype)
        if relu:
            output = tf.nn.relu(output)
        return output, shift, delta, variance, rstd

    return forward


def _backward(
    gradient: Any, rows: Any, gamma: Any, shift: Any, delta: Any, rstd: Any, *rectified: Any
) -> Any:
    for output in rectified:
        gradient = tf.where(output > 0, gradient, tf.zeros_like(gradient))
    share = _share(rows, gamma.dtype)
    gradient = tf.cast(gradient, gamma.dtype)
    deviations = tf.cast(rows, gamma.dtype) - _spread(shift, rows)
    d_beta = _total(gradient)
    d_gamma = (_total(gradient * deviations) - delta * d_beta) * rstd
    scale, slope = gamma * rstd, -gamma * tf.square(rstd) * d_gamma * share  # see _jax.py
    level = -scale * d_beta * share - slope * delta
    d_rows = gradient * _spread(scale, rows)
    d_rows = d_rows + (deviations * _spread(slope, rows) + _spread(level, rows))
    return tf.cast(d_rows, rows.dtype), d_gamma, d_beta


def _masked_backward(
    gradient: Any,
    rows: Any,
    gamma: Any,
    beta: Any,
    mask: Any,
    kept: Any,
    epsilon: Any,
    relu: bool,
) -> tuple[Any, Any, Any]:
    """The closed form of a masked batch, of statistics that depend on the rows."""
    dtype, counts = gamma.dtype, mask[:, None, None]
    count = tf.cast(tf.math.count_nonzero(mask), dtype)
    share = 1.0 / tf.maximum(count, 1.0)

    def average(values: Any) -> Any:
        return _total(tf.where(counts, values, 0.0)) * share

    deviations = tf.cast(rows, dtype) - _spread(kept[0], rows)
    deviations -= _spread(average(deviations), rows)  # Where none counts, kept is what normalised.
    variance = tf.where(count > 0, average(tf.square(deviations)), kept[1])
    rstd = tf.math.rsqrt(variance + epsilon)
    scale, gradient = rstd * gamma, tf.cast(gradient, dtype)
    if relu:
        output = deviations * _spread(scale, rows) + _spread(beta, rows)
        gradient = tf.where(output > 0, gradient, 0.0)
    d_beta, d_gamma = _total(gradient), _total(gradient * deviations) * rstd
    through = deviations * _spread(rstd * d_gamma, rows) + _spread(d_beta, rows)
    through = tf.where(counts, through * share, 0.0)
    return tf.cast((gradient - through) * _spread(scale, rows), rows.dtype), d_gamma, d_beta


def _share(rows: Any, dtype: Any) -> Any:
    shape = tf.shape(rows)
    count = shape[0] if len(rows.shape) == 2 else shape[0] * shape[2]
    return 1.0 / tf.cast(tf.maximum(count, 1), dtype)


def _total(rows: Any) -> Any:
    if len(rows.shape) == 3:
        # In two steps that XLA does not merge into one: it would add all numbers in sequence.
        sums = tf.reduce_sum(rows, 2)
        rows = tf.where(tf.math.is_nan(sums), tf.constant(math.nan, sums.dtype), sums)
    return tf.reduce_sum(rows, 0)


def _spread(per_channel: Any, rows: Any) -> Any:
    return per_channel if len(rows.shape) == 2 else per_channel[:, None]
