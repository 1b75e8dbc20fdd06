"""JAX: what happens when a computation runs. See :mod:`truenorm._kernels.run_time`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.core import Tracer
from jax.extend import core


def when_run(receive: Callable[[], None], tensor: Any) -> None:
    """A callback in the program, which runs when the program does.

    It is given a number of the tensor: JAX would take a callback without one out of a loop.
    """
    jax.debug.callback(lambda _: receive(), jnp.ravel(tensor)[:1])


def tell(receive: Callable[[dict[str, Any]], None], tensors: Mapping[str, Any]) -> bool:
    """A callback with the numbers."""
    jax.debug.callback(lambda found: receive(jax.tree.map(np.asarray, found)), dict(tensors))
    return True


def settle() -> None:
    """Wait for the callbacks."""
    jax.effects_barrier()


def place() -> Any:
    """The trace that is being made."""
    return core.get_opaque_trace_state()


def is_now() -> bool:
    """JAX may trace, which does not show."""
    return False


def is_value(tensor: Any) -> bool:
    """Whether this is an array that is still there, not what stands for one while JAX traces."""
    return not isinstance(tensor, Tracer) and not tensor.is_deleted()


def numbers(tensor: Any) -> np.ndarray[Any, Any] | None:
    """Those of an array; nothing stands in what JAX traces."""
    return np.asarray(tensor) if is_value(tensor) else None


def constants() -> AbstractContextManager[None]:
    """What is known is computed at once, not traced."""
    return jax.ensure_compile_time_eval()


def repeats() -> bool:
    """No: JAX repeats the operations of a program, not the Python that made them."""
    return False


def full_precision() -> AbstractContextManager[None]:
    """A setting that is part of what a compiled program is known by."""
    return jax.default_matmul_precision("float32")
