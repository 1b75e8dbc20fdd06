"""What is made with a seed set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import keras

T = TypeVar("T")


def seeded(seed: int, make: Callable[[], T]) -> T:
    """What ``make`` gives after the seed was set.

    If it was ``make`` that loaded TensorFlow, TensorFlow had no seed: it is made once more.
    """
    loaded = "tensorflow" in sys.modules
    keras.utils.set_random_seed(seed)
    made = make()
    if loaded or "tensorflow" not in sys.modules:
        return made
    keras.utils.set_random_seed(seed)
    return make()
