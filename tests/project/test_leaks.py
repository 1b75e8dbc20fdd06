"""What the tools leave in memory: no layer and no variable of a copy that a call made.

How much memory many calls take is measured by ``tests/torture/leaks.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import truenorm as tn

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = X[:, :1]


def freeze_and_undo(model: Any) -> None:
    frozen = tn.freeze(model)
    model.fit(X, Y, verbose=0)
    frozen.undo()
    model.fit(X, Y, verbose=0)


TOOLS: dict[str, Callable[[Any], Any]] = {
    "inspect": lambda model: tn.inspect(model, X, Y),
    "freeze, undo": freeze_and_undo,
    "recalibrate": lambda model: tn.recalibrate(model, X),
    "diagnose": lambda model: tn.diagnose(model, (X, Y)),
    "fold": tn.fold,
    "replace": lambda model: tn.replace(model, "truenorm"),
}


def alive() -> list[int]:
    """How many layers and variables there are."""
    for _ in range(3):  # some are freed by what is called when others are
        gc.collect()
    kinds = (keras.Layer, keras.Variable)
    living = [type(one) for one in gc.get_objects()]
    return [sum(issubclass(one, kind) for one in living) for kind in kinds]


@pytest.mark.long
@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_of_ours_stays_after_a_call(tool: str) -> None:
    layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    model: Any = keras.Sequential([*layers, keras.layers.ReLU(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    TOOLS[tool](model)
    before = alive()
    for _ in range(2):
        TOOLS[tool](model)
    assert all(now <= then for now, then in zip(alive(), before, strict=True))
