"""TensorFlow: what happens when a computation runs. See :mod:`truenorm._kernels.run_time`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

tf: Any = tensorflow

_ALONE = threading.RLock()
"""The setting is the process's: two threads that change it would put back each other's."""

REPEATS = ("tensorflow.python.ops.custom_gradient", "inner_recompute_grad")
"""Module and name of the function in which ``tf.recompute_grad`` runs a function once more."""


def when_run(receive: Callable[[], None], tensor: Any) -> None:
    """At once."""
    del tensor
    receive()


def tell(receive: Callable[[dict[str, Any]], None], tensors: Mapping[str, Any]) -> bool:
    """At once; not inside a graph."""
    if not tf.executing_eagerly():
        return False
    receive({name: None if t is None else t.numpy() for name, t in tensors.items()})
    return True


def settle() -> None:
    """All is told at once."""


def place() -> None:
    """TensorFlow's variables refuse what is a value inside a graph only."""


def is_now() -> bool:
    """Not while a graph is made; eager code reads the variable all the same."""
    return False


def is_value(tensor: Any) -> bool:
    """So they always hold one."""
    del tensor
    return True


def numbers(tensor: Any) -> Any:
    """Those of an eager tensor; there are none inside a graph."""
    return tensor.numpy() if tf.executing_eagerly() and hasattr(tensor, "numpy") else None


def constants() -> AbstractContextManager[None]:
    """A graph holds numbers that are known as they are."""
    return nullcontext()


def repeats() -> bool:
    """Whether the function of ``tf.recompute_grad`` is among the callers: nothing else tells."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == REPEATS:
            return True
        frame = frame.f_back
    return False


@contextmanager
def full_precision() -> Generator[None]:
    """A setting of the process."""
    settings = tf.config.experimental
    with _ALONE:
        before = settings.tensor_float_32_execution_enabled()
        settings.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            settings.enable_tensor_float_32_execution(before)
