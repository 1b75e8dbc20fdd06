"""TensorFlow on a processor: the compiled passes as operations (``native/tensorflow.c``).

XLA cannot compile them into a graph, and other machines and devices do not have them: there
TensorFlow's own operations are used.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels import library
from truenorm._kernels.contract import Tensor, Vector
from truenorm._kernels.tensorflow import plain
from truenorm._kernels.tensorflow.plain import Plan, Step

tf: Any = tensorflow
control_flow_util: Any = None
with contextlib.suppress(ImportError):  # another version of TensorFlow may not have it
    from tensorflow.python.ops import control_flow_util


def takes(x: Tensor) -> bool:
    """Whether the compiled passes can take this tensor in the graph that is being built."""
    return not (
        x.dtype.name not in library.DTYPES
        or _is_for_xla()
        or isinstance(tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy)
        or tf.config.list_physical_devices("GPU")
        or _operations() is None
    )


def _is_for_xla() -> bool:
    """Whether XLA will compile what is being built; yes where it is not known."""
    try:
        return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    except AttributeError:
        return True


def forward(
    plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``plain.py``."""
    given = (rows, gamma, beta, *others)
    output, kept = _of_batch(_operations().truenorm_forward, plan, *given)
    return tf.reshape(output, tf.shape(rows)), kept


def moments(
    plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, *others: Tensor
) -> tuple[Tensor]:
    """See ``plain.py``."""
    given = (rows, gamma, beta, *others)
    return _of_batch(_operations().truenorm_moments, plan, *given)[1:]


def _of_batch(
    operation: Any, plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, *others: Tensor
) -> tuple[Tensor, Tensor]:
    moving = others[:2] if plan.step else [tf.zeros(0, gamma.dtype)] * 2
    step = plan.step or Step(1.0, False)
    output, kept = operation(
        *(_with_inner(rows), gamma, beta, *moving, *_mask(plan, others)),
        tf.constant((plan.epsilon, step.momentum), tf.float64),
        relu=plan.relu,
        unbiased=step.unbiased,
        moves=plan.step is not None,
        threads=_threads(),
    )
    return output, tf.ensure_shape(kept, (6 if plan.step else 4, None))


def normalize(plan: Plan, rows: Tensor, gamma: Vector, beta: Vector, kept: Tensor) -> tuple[Tensor]:
    """See ``plain.py``."""
    output, _ = _operations().truenorm_normalize(
        *(_with_inner(rows), gamma, beta, kept), relu=plan.relu, threads=_threads()
    )
    return (tf.reshape(output, tf.shape(rows)),)


def backward(
    plan: Plan,
    rows: Tensor,
    gamma: Vector,
    beta: Vector,
    kept: Tensor,
    gradient: Tensor,
    *mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """See ``plain.py``."""
    d_rows, sums = _operations().truenorm_backward(
        *(_with_inner(rows), gamma, beta, kept, _with_inner(gradient), *_mask(plan, mask)),
        tf.convert_to_tensor(plan.epsilon, tf.float64),
        relu=plan.relu,
        threads=_threads(),
    )
    return tf.reshape(d_rows, tf.shape(rows)), tf.ensure_shape(sums, (2, None))


@tf.RegisterGradient("TruenormForward")
def _of_forward(op: Any, gradient: Tensor, _: Tensor) -> Any:
    """For forward accumulators, which look past the custom gradient of an eager call."""
    rows, gamma, beta, _, _, mask, numbers = op.inputs
    plan = Plan(numbers[0], op.get_attr("relu"), None, masked=True)
    d_rows, sums = backward(plan, rows, gamma, beta, op.outputs[1], gradient, mask)
    return d_rows, *tf.unstack(sums), *[None] * 4


@tf.RegisterGradient("TruenormBackward")
def _of_backward(op: Any, *cotangents: Tensor) -> Any:
    rows, gamma, beta, kept, gradient, mask, epsilon = op.inputs
    mask = tf.concat([mask, tf.fill([tf.shape(rows)[0] - tf.size(mask)], True)], 0)
    plan = Plan(tf.cast(epsilon, gamma.dtype), op.get_attr("relu"), None, masked=True)
    given = (rows, gamma, beta, kept, gradient, mask)
    of_rows, of_gamma, of_gradient = plain.second(plan, cotangents, *given)
    return of_rows, of_gamma, None, None, of_gradient, None, None


def _with_inner(rows: Tensor) -> Tensor:
    return rows[..., None] if len(rows.shape) == 2 else rows


def _mask(plan: Plan, others: tuple[Tensor, ...]) -> tuple[Tensor]:
    """The mask among them; of size 0 if there is none."""
    return others[-1:] if plan.masked else (tf.zeros(0, tf.bool),)


@cache
def _operations() -> Any:
    """What TensorFlow makes of the library; None without one.

    TensorFlow sees the operations only if it is the first to load the library.
    """
    found = None
    if library.flaw() is None:
        with contextlib.suppress(tf.errors.NotFoundError, OSError):
            found = tf.load_op_library(str(library.PATH))
    return found if library.loaded() is not None and hasattr(found, "truenorm_forward") else None


def _threads() -> int:
    return tf.config.threading.get_intra_op_parallelism_threads() or library.processors()
