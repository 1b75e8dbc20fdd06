"""JAX: what collecting statistics needs of it. See :mod:`truenorm._kernels.sums`.

float64 is off in JAX unless the user turns it on, for the whole process; here it is turned on for
single operations while they are traced. XLA fuses the conversion, so no float64 copy of the data is
made. Both sums are one reduction: XLA on a CPU would otherwise read the rows twice.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax import experimental
from jax import numpy as jnp
from jax.experimental import io_callback, multihost_utils

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # where it was before
    from jax.core import get_opaque_trace_state

from truenorm._errors import DistributedError
from truenorm._kernels.contract import Tensor, Vector
from truenorm._kernels.jax import native

GROUP = 32
"""Rows reduced at a time: XLA on a CPU vectorises a short middle axis, not a long first one."""


def float64() -> AbstractContextManager[None]:
    """Operations traced in here may be of float64."""
    before: Any = experimental  # where the name was before JAX 0.8
    return (jax if hasattr(jax, "enable_x64") else before).enable_x64(True)


def compiled_sums(rows: Tensor) -> Tensor | None:
    """The same of all rows about their mean, by the compiled pass; None where it is not there.

    XLA compiles a call of it in no time, and loops over a float64 sum for as long as a layer.
    """
    if not native.takes(rows):
        return None
    with float64():
        return _sums_of(rows)


@jax.custom_jvp
def _sums_of(rows: Tensor) -> Tensor:
    mean, low, variance = native.moments(rows, dtype="float64", plain=_moments)
    return jnp.stack([mean + low, jnp.zeros_like(mean), variance * len(rows)])


@_sums_of.defjvp
def _moving_sums(at: Any, tangents: Any) -> Any:
    """A model may differentiate inside of itself, through the statistics too."""
    (rows,), (change,) = at, tangents
    with float64():
        sums, change = _sums_of(rows), change.astype("float64")
        deviations = rows - sums[0]
        moved = [change.mean(0), jnp.zeros_like(sums[0]), 2.0 * (deviations * change).sum(0)]
        return sums, jnp.stack(moved)


def _moments(rows: Tensor, dtype: Any) -> tuple[Vector, Vector, Vector]:
    """Mean, what rounding takes from it, and variance: in a program that leaves this processor."""
    with float64():
        shift, first, second = centred_sums(rows, rows[0]).astype(dtype)
        delta = first / len(rows)
        return shift + delta, jnp.zeros_like(delta), second / len(rows) - delta * delta


def centred_sums(rows: Tensor, shift: Vector) -> Tensor:
    """Shift, sum and sum of squares of ``rows - shift`` per column, float64, as one array."""
    whole = len(rows) // GROUP * GROUP
    with float64():
        shift = shift.astype("float64")
        grouped = (rows[:whole] - shift).reshape(-1, GROUP, rows.shape[1])
        first, second = (group.sum(0) for group in _both(grouped, 1))
        if whole < len(rows):
            rest = _both(rows[whole:] - shift, 0)
            first, second = first + rest[0], second + rest[1]
        return jnp.stack([shift, first, second])


def _both(deviations: Tensor, axis: int) -> Any:
    zero = jnp.zeros((), "float64")
    return jax.lax.reduce(
        (deviations, deviations * deviations),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        (axis,),
    )


def joined(
    parts: Sequence[tuple[Vector, Tensor]], counts: np.ndarray[Any, Any] | None = None
) -> Tensor:
    """Counts and sums of all calls side by side, shape (4, channels of all calls).

    ``counts`` is their row where it is known beforehand: a number for each channel of each call.
    """
    del counts  # an array would stand beside the program, which is then not kept
    with float64():
        rows = [jnp.broadcast_to(n, s.shape[1:]).astype("float64") for n, s in parts]
        row = jnp.concatenate([jnp.zeros(0, "float64"), *rows])
        sums = jnp.concatenate([jnp.zeros((3, 0), "float64"), *(s for _, s in parts)], axis=1)
        return jnp.concatenate([row[None], sums])


def compiled(function: Callable[..., Any], jit: bool) -> Callable[..., Any]:
    """The function as one program, where the model allows it; see :func:`_program`."""
    if not jit:
        return function
    jitted = jax.jit(function, keep_unused=True)  # or the text says not which are used
    if jax.device_count() > 1:  # arrays may be spread over devices, in a way of their own each time
        return jitted
    programs: dict[Any, Callable[..., Any]] = {}

    def run(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        kinds = ((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)
        key = (structure, *((kind.shape, kind.dtype, place) for kind, place in kinds))
        if key not in programs:
            programs[key] = _program(jitted, arguments, key)
        return programs[key](*arguments)

    return run


MOST = 8
"""Programs that are kept."""

_kept: OrderedDict[Any, Callable[..., Any]] = OrderedDict()


def _program(jitted: Any, arguments: Any, kinds: Any) -> Callable[..., Any]:
    """The function, traced for these arguments; compiled, unless the same program has been before.

    Compiling takes ten times as long as tracing, and a model that is looked at again gives the same
    program: what has changed in it is either an argument or stands in the program's text. What is
    not wholly in there (arrays of a user's own function, calls of Python) is not kept.
    """
    traced = jitted.trace(*arguments)
    lowered = traced.lower()
    text = lowered.as_text()
    if traced.jaxpr.consts or "callback" in text:
        return jitted
    key = (hashlib.sha256(text.encode()).digest(), lowered.out_tree, kinds)
    found = _kept.pop(key, None) or lowered.compile()
    _kept[key] = found
    if len(_kept) > MOST:
        _kept.popitem(last=False)
    return found


def anew(function: Any) -> Callable[..., Any] | None:
    """None: a function that was given to ``jax.jit`` keeps a Keras variable's value for good."""
    del function


def program() -> Any:
    """What is being traced; see :mod:`truenorm._kernels.sums`."""
    return get_opaque_trace_state()


def tell(function: Callable[[np.ndarray[Any, Any]], None], value: Any) -> None:
    """Hand float64 numbers to a Python function whenever the program comes by."""

    def receive(words: Any) -> None:
        function(np.ascontiguousarray(words).view(np.float64)[..., 0])

    with float64():
        # As words of 32 bits: at run time float64 is off again.
        words = jax.lax.bitcast_convert_type(value, "uint32")
    io_callback(receive, None, words)


def told() -> None:
    """Wait until all has been handed over."""
    jax.effects_barrier()


def is_mapped(x: Any) -> bool:
    """JAX calls back once for each repetition."""
    del x
    return False


def processes() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    return jax.process_index(), jax.process_count()


def gather(vector: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """The float64 vectors of all processes, bit for bit; every process must call it."""
    try:
        rows = np.asarray(multihost_utils.process_allgather(vector.view(np.uint8)))
    except (RuntimeError, ValueError) as error:  # JAX gives Gloo's as the latter
        raise DistributedError(
            "Another process did not take part in the exchange of statistics",
            expected="processes that do the same, equally often and in one order",
            received=str(error).strip().partition("\n")[0],
            remedy="look at what the other processes say; when one is taken for lost is the "
            "heartbeat_timeout_seconds= of jax.distributed.initialize",
        ) from error
    return [np.ascontiguousarray(row).view(np.float64) for row in rows]
