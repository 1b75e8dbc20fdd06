"""TensorFlow: what collecting statistics needs of it. See :mod:`truenorm._kernels.sums`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels.contract import Tensor, Vector

tf: Any = tensorflow
GROUP = 32


FEW = 2048
"""Up to so many rows all is float64; of more, the rounding of float32 averages out."""


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


def joined(sums: Sequence[Tensor]) -> Tensor:
    """All sites' sums side by side, so that one array goes to the host."""
    return tf.concat(sums, axis=1)


def compiled(function: Callable[..., Any], jit: bool) -> Callable[..., Any]:
    """The function as a graph, as ``predict`` has it."""
    return tf.function(function, reduce_retracing=True, autograph=False) if jit else function


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
    gathered = strategy.gather(strategy.run(lambda: tf.constant(vector)[None]), axis=0)
    replicas = strategy.num_replicas_in_sync // processes()[1]
    return list(gathered.numpy()[::replicas])
