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
from typing import Any, NamedTuple

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
    """See :mod:`truenorm._kernels`. Masks of rows are taken; the composite takes others."""
    if ragged.is_ragged(x):
        return ragged.of_values(normalize, x, gamma, beta, options)
    axis, epsilon, mask, moving, relu, add, correct = options
    if add is not None:  # XLA makes one of what is done value by value.
        alone = normalize(x, gamma, beta, options._replace(relu=False, add=None))
        return composite.added_to(alone, options)
    x = _with_channels(tf.convert_to_tensor(x), axis, gamma, beta, moving)
    channel = axis % len(x.shape)
    channels, last = x.shape[channel], channel == len(x.shape) - 1
    dtype = statistics_dtype(x.dtype)
    compiled = native.takes(x)
    takes_moving = _same(dtype, moving) and (compiled or mask is not None)
    if mask is not None and not (takes_moving and last and not by_channel(mask, channel)):
        return composite.normalize(x, gamma, beta, options)
    if correct is not None and tf.executing_eagerly():  # Forward accumulators see operations.
        return composite.corrected(normalize, x, gamma, beta, options)
    rows, values = _as_rows(x, channel)
    others, step, moves = (), None, False
    if moving is not None and takes_moving:
        others, moves = moving[:2], moving.momentum is not None
        step = Step(1.0 if moving.momentum is None else moving.momentum, moving.unbiased)
    if mask is not None:
        mask = _mask_of_rows(mask, x)
        others = (*others, mask)
    count = tf.cast(values if mask is None else tf.math.count_nonzero(mask), dtype)
    kind = Kind(x.dtype.name, dtype, len(rows.shape), compiled, tf.executing_eagerly())
    plan = Plan(epsilon, relu, step, mask is not None)
    scale, offset = _weights(channels, dtype, gamma, beta)
    if correct is not None:
        plan = plan._replace(known=True)
        (kept,) = _function("moments", plan, kind)(rows, scale, offset, *others)
        found = tf.ensure_shape(tf.stop_gradient(kept[:2]), (2, channels))
        mean, variance = tf.unstack(found)
        weights = correct(Normalized(None, mean, variance, count), gamma, beta)
        scale, offset = _weights(channels, dtype, *weights)
        others = (kept, *others[2 if step else 0 :])
    output, *statistics = _kernel(plan, kind)(rows, scale, offset, *others)
    output = tf.reshape(output, tf.shape(x))
    output.set_shape(x.shape)
    for vector in statistics:
        vector.set_shape((channels,))
    mean, variance, *moved = (tf.stop_gradient(vector) for vector in statistics)
    return Normalized(output, mean, variance, count, moved=tuple(moved) if moves else None)


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

    axis, epsilon, mask, moving, relu, _, correct = options
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
        correct=correct,
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


class Kind(NamedTuple):
    """Of what tensors a kernel is, and where it runs.

    Args:
        x: The dtype of the rows.
        dtype: That of their statistics.
        rank: The rank of the rows.
        compiled: Whether the compiled passes take them.
        eager: Whether no graph is made.
    """

    x: str
    dtype: str
    rank: int
    compiled: bool
    eager: bool


@lru_cache(maxsize=64)
def _function(name: str, plan: Plan, kind: Kind) -> Callable[..., Any]:
    """One of the functions that ``native.py`` and ``plain.py`` have both."""
    here = partial(getattr(native if kind.compiled else plain, name), plan)
    if kind.eager:
        return here
    rows = tf.TensorSpec([None] * kind.rank, kind.x)
    channels, kept = (
        tf.TensorSpec(shape, kind.dtype) for shape in ([None], [6 if plan.step else 4, None])
    )
    mask = [tf.TensorSpec([None], tf.bool)] * plan.masked
    moving = [channels] * (2 if plan.step else 0)
    others = {"normalize": [kept], "backward": [kept, rows, *mask]}.get(name, [*moving, *mask])
    signature = (rows, channels, channels, *others)
    if not kind.compiled:
        here = tf.function(here, jit_compile=True, autograph=False, input_signature=signature)
    return portable(here, partial(getattr(plain, name), plan), signature)


@lru_cache(maxsize=64)
def _kernel(plan: Plan, kind: Kind) -> Callable[..., Any]:
    """The kernel for one plan and kind."""
    forward = _function("normalize" if plan.known else "forward", plan, kind)
    backward = _function("backward", plan, kind)

    @tf.custom_gradient
    def differentiable_backward(*given: Tensor) -> Any:
        if not kind.eager:  # As tensors of this graph: the second derivative's sees no others.
            given = tuple(tf.identity(tensor) for tensor in given)

        def second(*cotangents: Any) -> Any:
            of_rows, of_gamma, of_gradient = plain.second(plan, cotangents, *given)
            return of_rows, of_gamma, None, None, of_gradient, *[None] * plan.masked

        return backward(*given), second

    @tf.custom_gradient
    def kernel(rows: Tensor, gamma: Vector, beta: Vector, *others: Tensor) -> Any:
        if plan.known:
            kept = others[0]
            (output,) = forward(rows, gamma, beta, kept)
        else:
            output, kept = forward(rows, gamma, beta, *others)

        def first(gradient: Tensor, *_: Any) -> Any:
            mask = others[-1:] if plan.masked else ()
            d_rows, sums = differentiable_backward(rows, gamma, beta, kept, gradient, *mask)
            return d_rows, *tf.unstack(sums), *[None] * len(others)

        mean, variance, _, _, *moved = tf.unstack(kept)
        return (output, mean, variance, *moved), first

    return kernel
