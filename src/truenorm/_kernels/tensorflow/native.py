"""TensorFlow on a processor: the compiled passes as two operations (``native/tensorflow.c``).

XLA cannot compile them into a graph, and other machines and devices do not have them: there
TensorFlow's own operations are used. So they are where nothing is differentiated, which may be the
graph of a model that is exported.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any, NamedTuple

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels import library
from truenorm._kernels.contract import Scalar, Tensor, Vector

tf: Any = tensorflow
record: Any = None
control_flow_util: Any = None
with contextlib.suppress(ImportError):  # another version of TensorFlow may not have them
    from tensorflow.python.eager import record
    from tensorflow.python.ops import control_flow_util


class Step(NamedTuple):
    """The step of the moving statistics: their weight, and whether the variance is unbiased."""

    momentum: float
    unbiased: bool


def takes(x: Tensor) -> bool:
    """Whether the compiled passes can take this tensor in the graph that is being built."""
    return not (
        x.dtype.name not in library.DTYPES
        or not _trains_here()
        or isinstance(tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy)
        or tf.config.list_physical_devices("GPU")
        or _operations() is None
    )


def _trains_here() -> bool:
    """Whether something is differentiated, and not by XLA; no where it is not known."""
    try:
        graph = tf.compat.v1.get_default_graph()
        return bool(
            record.could_possibly_record()
            and not control_flow_util.GraphOrParentsInXlaContext(graph)
        )
    except AttributeError:
        return False


def forward(
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    mask: Tensor,
    *moving: Vector,
    epsilon: float,
    relu: bool,
    step: Step,
) -> tuple[Tensor, Tensor]:
    """Output, and in rows: mean, variance, what rounding takes from the mean, and rstd.

    And the moving mean and variance after a step of this momentum, if they are given. ``rows`` is
    (outer, channels, inner); the mask (outer,), or () if all count.
    """
    output, kept = _operations().truenorm_forward(
        *(rows, gamma, beta, *(moving or [tf.zeros(0, gamma.dtype)] * 2), mask),
        tf.constant((epsilon, step.momentum), tf.float64),
        relu=relu,
        unbiased=step.unbiased,
        moves=bool(moving),
        threads=_threads(),
    )
    return output, tf.ensure_shape(kept, (4 + len(moving), None))


def backward(
    gradient: Tensor,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    mask: Tensor,
    kept: Tensor,
    *,
    epsilon: Scalar,
    relu: bool,
) -> tuple[Tensor, Vector, Vector]:
    """The gradients of a loss with respect to rows, gamma and beta."""
    d_rows, sums = _operations().truenorm_backward(
        *(rows, gamma, beta, kept, gradient, mask, tf.convert_to_tensor(epsilon, tf.float64)),
        relu=relu,
        threads=_threads(),
    )
    d_gamma, d_beta = tf.unstack(tf.ensure_shape(sums, (2, None)))
    return d_rows, d_gamma, d_beta


@cache
def _operations() -> Any:
    """What TensorFlow makes of the library; None without one.

    TensorFlow sees the operations only if it is the first to load the library.
    """
    if not library.is_whole():
        return None
    try:
        found = tf.load_op_library(str(library.PATH))
    except (tf.errors.NotFoundError, OSError):
        return None
    return found if library.loaded() is not None and hasattr(found, "truenorm_forward") else None


_operations()  # Graphs that were saved with them find them as soon as this is imported.


@tf.RegisterGradient("TruenormForward")
def _gradient(op: Any, gradient: Any, _: Any) -> Any:
    """For what looks past the custom gradient: vectorized maps, forward accumulators."""
    rows, gamma, beta, _, _, mask, numbers = op.inputs
    kept, relu = op.outputs[1], op.get_attr("relu")
    found = backward(gradient, rows, gamma, beta, mask, kept, epsilon=numbers[0], relu=relu)
    return *found, *[None] * 4


def _threads() -> int:
    return tf.config.threading.get_intra_op_parallelism_threads() or library.processors()
