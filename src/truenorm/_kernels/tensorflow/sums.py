"""TensorFlow: what collecting statistics needs of it. See :mod:`truenorm._kernels.sums`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._errors import DistributedError
from truenorm._kernels.contract import Tensor, Vector
from truenorm._kernels.tensorflow import native, plain

tf: Any = tensorflow
GROUP = 32


FEW = 2048
"""Up to so many rows ``centred_sums`` is float64; of more, float32's rounding averages out."""

MOST = 16
"""Graphs that are kept: sequences may have any length."""


def compiled_sums(rows: Tensor) -> Tensor | None:
    """The same of all rows about their mean, by the compiled pass; None where it is not there."""
    if not native.takes(rows):
        return None
    return _sums_of(rows)


@tf.custom_gradient
def _sums_of(rows: Tensor) -> Any:
    nothing = tf.zeros(0, "float64")
    plan = plain.Plan(0.0, relu=False, step=None, masked=False)
    (kept,) = native.moments(plan, rows, nothing, nothing)
    kept.set_shape((4, rows.shape[1]))
    mean, variance, low, _ = tf.unstack(kept)
    count = tf.cast(tf.shape(rows)[0], "float64")
    mean += low

    def gradient(of_sums: Tensor) -> Tensor:
        """A model may differentiate inside of itself, through the statistics too."""
        deviations = tf.cast(rows, "float64") - mean
        return tf.cast(of_sums[0] / count + 2.0 * deviations * of_sums[2], rows.dtype)

    return tf.stack([mean, tf.zeros_like(mean), variance * count]), gradient


@tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
def centred_sums(rows: Tensor, shift: Vector) -> Tensor:
    """Shift, sum and sum of squares of ``rows - shift`` per column, float64, as one array."""
    return tf.cond(
        tf.shape(rows)[0] <= FEW,
        lambda: _sums(tf.cast(rows, "float64"), tf.cast(shift, "float64")),
        lambda: _sums(tf.cast(rows, shift.dtype), shift),
    )


def _sums(rows: Tensor, shift: Vector) -> Tensor:
    deviations = rows - shift
    size = tf.shape(rows)
    whole = size[0] // GROUP * GROUP
    grouped = tf.reshape(deviations[:whole], (-1, GROUP, size[1]))
    rest = deviations[whole:]

    def total(groups: Tensor, rest: Tensor) -> Vector:
        sums = (tf.reduce_sum(groups, 1), tf.reduce_sum(rest, 0, keepdims=True))
        return tf.add_n([tf.reduce_sum(tf.cast(part, "float64"), 0) for part in sums])

    first, second = total(grouped, rest), total(tf.square(grouped), tf.square(rest))
    return tf.stack([tf.cast(shift, "float64"), first, second])


def joined(
    parts: Sequence[tuple[Vector, Tensor]], counts: np.ndarray[Any, Any] | None = None
) -> Tensor:
    """Counts and sums of all calls side by side, shape (4, channels of all calls).

    ``counts`` is their row where it is known beforehand: a number for each channel of each call.
    """
    sums = tf.concat([tf.zeros((3, 0), "float64"), *(sums for _, sums in parts)], axis=1)
    row: Any = counts
    if row is None:
        rows = [tf.cast(tf.broadcast_to(n, tf.shape(s)[1:]), "float64") for n, s in parts]
        row = tf.concat([tf.zeros(0, "float64"), *rows], axis=0)
    return tf.concat([row[None], sums], axis=0)


def compiled(function: Callable[..., Any], jit: bool) -> Callable[..., Any]:
    """The function as a graph for each shape of its arguments; as it is for more than :data:`MOST`.

    ``predict`` has one graph for all, in which a batch has no size and a sequence may have no
    length: then a Python branch on them goes one way, and ``TimeDistributed`` becomes a vectorised
    map.
    """
    if not jit:
        return function
    graphs: dict[Any, Callable[..., Any]] = {}

    def run(*arguments: Any) -> Any:
        key = tuple((a.shape, a.dtype) for a in tf.nest.flatten(arguments))
        if key not in graphs and len(graphs) < MOST:
            graphs[key] = tf.function(function, autograph=False)
        return graphs.get(key, function)(*arguments)

    return run


def anew(function: Any) -> Callable[..., Any] | None:
    """A ``tf.function`` that has not been traced yet, of what this one was made of."""
    plain = getattr(function, "python_function", None)
    return None if plain is None else tf.function(plain)


def program() -> Any:
    """What is being traced; see :mod:`truenorm._kernels.sums`."""
    return None if tf.executing_eagerly() else id(tf.compat.v1.get_default_graph())


def tell(function: Callable[[np.ndarray[Any, Any]], None], value: Any) -> None:
    """Hand numbers to a Python function whenever the program comes by."""
    tf.numpy_function(function, [value], [])


def told() -> None:
    """A program has ended when it returns."""


def is_mapped(x: Any) -> bool:
    """``tf.vectorized_map`` traces its function once, under this name."""
    del x
    return any(part.startswith("loop_body") for part in tf.get_current_name_scope().split("/"))


def processes() -> tuple[int, int]:
    """Number of this process, and how many there are: inside a multi-worker strategy's scope."""
    resolver = tf.distribute.get_strategy().cluster_resolver
    if resolver is None or not tf.distribute.has_strategy():
        return 0, 1
    workers = resolver.cluster_spec().as_dict().get("worker", [None])
    return (resolver.task_id or 0), len(workers)


def gather(vector: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """The float64 vectors of all workers; every worker must call it."""
    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync // processes()[1]
    try:
        gathered = strategy.gather(strategy.run(lambda: tf.constant(vector)[None]), axis=0)
        return list(gathered.numpy()[::replicas])
    except tf.errors.OpError as error:
        raise DistributedError(
            "Another worker did not take part in the exchange of statistics",
            expected="workers that do the same, equally often and in one order",
            received=str(error).strip().splitlines()[0],
            remedy="look at what the other workers say; how long they are waited for is "
            "communication_options= of tf.distribute.MultiWorkerMirroredStrategy",
        ) from error
