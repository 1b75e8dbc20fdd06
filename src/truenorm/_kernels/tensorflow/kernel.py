r"""TensorFlow: the compiled passes where they can be, else its own operations, by XLA in a graph.

The closed form is over two-dimensional rows where the channels are last: XLA on a CPU reduces the
first axis of a matrix ten times faster than three axes of a tensor of rank 4. XLA compiles once per
shape of the input. Eager calls do without it: each new size would be compiled anew.

What leaves the process inside a graph is TensorFlow's operations alone (``portable.py``).

TensorFlow's own fused op sums in sequence (an error 10 times larger on 100,000 values), has no
float64, and becomes E[x²] − E[x]² (NaN where the mean is large) inside a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels import composite, ghosts
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
from truenorm._kernels.tensorflow import native, plain, ragged, synchronized
from truenorm._kernels.tensorflow.plain import Plan, Step
from truenorm._kernels.tensorflow.portable import portable

tf: Any = tensorflow


def normalize(x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options) -> Normalized:
    """See :mod:`truenorm._kernels`. Masks take the compiled passes, or else the composite."""
    if ragged.is_ragged(x):
        return ragged.of_values(normalize, x, gamma, beta, options)
    axis, epsilon, mask, moving, relu, add = options
    if add is not None:  # XLA makes one of what is done value by value.
        alone = normalize(x, gamma, beta, options._replace(relu=False, add=None))
        return composite.added_to(alone, options)
    x = _with_channels(tf.convert_to_tensor(x), axis, gamma, beta, moving)
    channel = axis % len(x.shape)
    channels, last = x.shape[channel], channel == len(x.shape) - 1
    dtype = statistics_dtype(x.dtype)
    compiled = native.takes(x)
    takes_moving = compiled and _same(dtype, moving)
    if mask is not None and not (takes_moving and last and not by_channel(mask, channel)):
        return composite.normalize(x, gamma, beta, options)
    scale, offset = _weights(channels, dtype, gamma, beta)
    rows, values = _as_rows(x, channel)
    others, step, moves = (), None, False
    if moving is not None and takes_moving:
        others, moves = moving[:2], moving.momentum is not None
        step = Step(1.0 if moving.momentum is None else moving.momentum, moving.unbiased)
    if mask is not None:
        mask = _mask_of_rows(mask, x)
        others = (*others, mask)
    kernel = _kernel(
        Plan(epsilon, relu, step, mask is not None),
        *(x.dtype.name, dtype, len(rows.shape)),
        compiled=compiled,
        eager=tf.executing_eagerly(),
    )
    output, *statistics = kernel(rows, scale, offset, *others)
    output = tf.reshape(output, tf.shape(x))
    output.set_shape(x.shape)
    for vector in statistics:
        vector.set_shape((channels,))
    mean, variance, *moved = (tf.stop_gradient(vector) for vector in statistics)
    count = values if mask is None else tf.math.count_nonzero(mask)
    return Normalized(
        *(output, mean, variance, tf.cast(count, dtype)),
        moved=tuple(moved) if moves else None,
    )


def _with_channels(
    x: Tensor, axis: int, gamma: Vector | None, beta: Vector | None, moving: Moving | None
) -> Tensor:
    """The tensor, whose number of channels the weights know where its shape does not."""
    if x.shape[axis] is None:
        shape = x.shape.as_list()
        weights = (gamma, beta, *(moving[:2] if moving else ()))
        shape[axis] = next((w.shape[0] for w in weights if w is not None), None)
        x = tf.ensure_shape(x, shape)
    return x


def _same(dtype: str, moving: Moving | None) -> bool:
    """Whether the moving statistics, if there are any, are of this dtype."""
    return moving is None or moving.mean.dtype == moving.variance.dtype == dtype


def normalize_ghosts(
    x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options, *, size: int
) -> Normalized:
    """See :mod:`truenorm._kernels`; each ghost batch has the values that its samples have."""
    kernel = partial(ghosts.normalize_ghosts, size=size, each=normalize)
    if ragged.is_ragged(x):
        return ragged.padded(kernel, x, gamma, beta, options)
    return kernel(x, gamma, beta, options)


def normalize_synchronized(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
    *,
    over: object = None,
) -> Normalized:
    """See :mod:`truenorm._kernels`: over the replicas of the ``tf.distribute`` strategy."""
    del over  # JAX's devices have names.
    if ragged.is_ragged(x):
        return ragged.of_values(normalize_synchronized, x, gamma, beta, options)
    replica = tf.distribute.get_replica_context()
    replicas = getattr(replica, "num_replicas_in_sync", 1)  # None between replicas
    if replicas == 1:
        return normalize(x, gamma, beta, options)

    axis, epsilon, mask, moving, relu, _ = options
    x = _with_channels(tf.convert_to_tensor(x), axis, gamma, beta, moving)
    channel = axis % len(x.shape)
    last = channel == len(x.shape) - 1
    if mask is not None and not (last and not by_channel(mask, channel)):
        return composite.normalize(x, gamma, beta, options, gather=synchronized.gather(replica))
    dtype = statistics_dtype(x.dtype)
    scale, offset = _weights(x.shape[channel], dtype, gamma, beta)
    rows, _ = _as_rows(x, channel)
    if mask is not None:
        mask = _mask_of_rows(mask, x)
    output, mean, variance, count = synchronized.normalize(
        *(rows, scale, offset, mask),
        None if moving is None else tuple(tf.cast(value, dtype) for value in moving[:2]),
        epsilon=epsilon,
        relu=relu,
        replica=replica,
    )
    output = tf.reshape(output, tf.shape(x))
    output.set_shape(x.shape)
    for vector in (mean, variance):
        vector.set_shape(x.shape[channel])
    return Normalized(output, mean, variance, count)


def _weights(
    channels: int, dtype: str, gamma: Vector | None, beta: Vector | None
) -> tuple[Vector, Vector]:
    """Gamma and beta in a dtype; 1 and 0 where there are none."""
    scale = tf.ones(channels, dtype) if gamma is None else tf.cast(gamma, dtype)
    return scale, tf.zeros(channels, dtype) if beta is None else tf.cast(beta, dtype)


def _as_rows(x: Tensor, channel: int) -> tuple[Tensor, Scalar]:
    """The values as (outer, channels) or (outer, channels, inner); how many a channel has."""
    last, shape = channel == len(x.shape) - 1, tf.shape(x)
    after = 1 if last else tf.reduce_prod(shape[channel + 1 :])
    before = tf.reduce_prod(shape[:channel])
    sizes = (before, x.shape[channel]) if last else (before, x.shape[channel], after)
    return tf.reshape(x, sizes), before * after


def _mask_of_rows(mask: Tensor, x: Tensor) -> Tensor:
    """A mask that is alike for all channels, which are last."""
    return tf.reshape(tf.broadcast_to(tf.squeeze(mask, -1), tf.shape(x)[:-1]), [-1])


@lru_cache(maxsize=64)
def _kernel(
    plan: Plan, x_dtype: str, dtype: str, rank: int, *, compiled: bool, eager: bool
) -> Callable[..., Any]:
    """The kernel for one plan, and rows of one dtype and rank whose statistics have a dtype."""
    passes = native if compiled else plain
    forward, backward = partial(passes.forward, plan), partial(passes.backward, plan)
    if not eager:
        rows = tf.TensorSpec([None] * rank, x_dtype)
        channels, kept = (
            tf.TensorSpec(shape, dtype) for shape in ([None], [6 if plan.step else 4, None])
        )
        mask = [tf.TensorSpec([None], tf.bool)] * plan.masked
        moving = [channels] * (2 if plan.step else 0)
        for_forward = (rows, channels, channels, *moving, *mask)
        for_backward = (rows, channels, channels, kept, rows, *mask)
        if not compiled:
            by_xla = partial(tf.function, jit_compile=True, autograph=False)
            forward = by_xla(forward, input_signature=for_forward)
            backward = by_xla(backward, input_signature=for_backward)
        forward = portable(forward, partial(plain.forward, plan), for_forward)
        backward = portable(backward, partial(plain.backward, plan), for_backward)

    @tf.custom_gradient
    def differentiable_backward(*given: Tensor) -> Any:
        if not eager:  # As tensors of this graph: that of the second derivative sees no others.
            given = tuple(tf.identity(tensor) for tensor in given)

        def second(*cotangents: Any) -> Any:
            of_rows, of_gamma, of_gradient = plain.second(plan, cotangents, *given)
            return of_rows, of_gamma, None, None, of_gradient, *[None] * plan.masked

        return backward(*given), second

    @tf.custom_gradient
    def kernel(rows: Tensor, gamma: Vector, beta: Vector, *others: Tensor) -> Any:
        output, kept = forward(rows, gamma, beta, *others)

        def first(gradient: Tensor, *_: Any) -> Any:
            mask = others[-1:] if plan.masked else ()
            d_rows, sums = differentiable_backward(rows, gamma, beta, kept, gradient, *mask)
            return d_rows, *tf.unstack(sums), *[None] * len(others)

        mean, variance, _, _, *moved = tf.unstack(kept)
        return (output, mean, variance, *moved), first

    return kernel
