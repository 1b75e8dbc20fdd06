"""TensorFlow: the replicas of a strategy. See :mod:`truenorm._kernels.replicas`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

tf: Any = tensorflow


def parts(variable: Any) -> list[Any]:
    """Those that a strategy has given it."""
    value = variable.value
    return [*value.values] if isinstance(value, tf.distribute.DistributedValues) else [variable]


def each(variable: Any, function: Callable[[], None]) -> None:
    """By the strategy that the variable is of."""
    if len(parts(variable)) > 1 and not in_replica():
        variable.value.distribute_strategy.run(function)
    else:
        function()


def in_replica() -> bool:
    """A thread of its own has entered a strategy, but is not between its replicas."""
    return tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()


def strategy() -> Any:
    """The one whose scope is open, also in its replicas."""
    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
