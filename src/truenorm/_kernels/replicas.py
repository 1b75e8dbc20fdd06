"""Replicas of a model in one process: devices that each have values of their own of a variable.

Only a strategy of ``tf.distribute`` makes such: its variables have a part on each device, and what
a replica assigns goes to its own. Read outside of a replica, they give the first one's part, and
what is assigned there goes to all.

* ``parts(variable)``: the parts of a variable in this process, the first replica's first; of others
  the variable itself.
* ``each(variable, function)``: run the function once for each replica that has a part; where this
  is a replica already, or there are none, once.
* ``in_replica()``: whether this is a thread that a framework has started for a replica.
* ``strategy()``: under which strategy this code runs, or makes variables; None under none.

Only the files named after a framework import one, and only that of the backend in use is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

if keras.config.backend() == "tensorflow":
    from truenorm._kernels.tensorflow.replicas import each, in_replica, parts, strategy
else:

    def parts(variable: Any) -> list[Any]:
        """One process has one model."""
        return [variable]

    def each(variable: Any, function: Callable[[], None]) -> None:
        """So there is one to run for."""
        del variable
        function()

    def in_replica() -> bool:
        """And none is a replica."""
        return False

    def strategy() -> Any:
        """Nor under a strategy."""


__all__ = ["each", "in_replica", "parts", "strategy"]
