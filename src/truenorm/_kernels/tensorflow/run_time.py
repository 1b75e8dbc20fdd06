"""TensorFlow: what happens when a computation runs. See :mod:`truenorm._kernels.run_time`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

tf: Any = tensorflow


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


def is_value(tensor: Any) -> bool:
    """So they always hold one."""
    del tensor
    return True
