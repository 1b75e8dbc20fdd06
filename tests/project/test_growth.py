"""The tools' work grows with the number of layers, not with its square: Python's calls, counted."""

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import truenorm as tn

INPUTS = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
LABELS = np.arange(12) % 2

TOOLS: dict[str, Callable[[Any], Any]] = {
    "inspect": lambda model: tn.inspect(model, INPUTS, LABELS, progress=False),
    "collect": lambda model: tn.collect(model, INPUTS, batch_size=4, progress=False),
    "diagnose": lambda model: tn.diagnose(model, INPUTS, LABELS, batch_size=4, progress=False),
    "fold": lambda model: tn.fold(model, progress=False),
    "place": lambda model: tn.place(model, "after_activation"),
    "replace": lambda model: tn.replace(model, progress=False),
}


def healthy(groups: int, normalizations: int = 1) -> Any:
    """Groups of a dense layer, BatchNormalization and a ReLU, a third of them in a model within."""
    inputs = keras.Input((4,))
    x = inputs
    for inside in (False, True, False):
        start = keras.Input((4,)) if inside else x
        end = start
        for _ in range(groups // 3):
            end = keras.layers.Dense(4)(end)
            for _ in range(normalizations):
                end = keras.layers.BatchNormalization()(end)
            end = keras.layers.ReLU()(end)
        x = keras.Model(start, end, name="within")(x) if inside else end
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def faulty(groups: int) -> Any:
    """The same, with something to say of every BatchNormalization.

    Each stands behind another one; all were frozen after ``compile`` by the model within, or not
    with it.
    """
    model = healthy(groups, normalizations=2)
    within = model.get_layer("within")
    within.trainable = False
    for layer in (*model.layers, *within.layers):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = layer in within.layers
    return model


def calls_of(run: Callable[[], Any]) -> int:
    """How many Python functions are called in this thread."""
    count = 0

    def hear(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(hear)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.long
@pytest.mark.parametrize("build", [healthy, faulty])
@pytest.mark.parametrize("tool", TOOLS)
def test_the_work_per_layer_is_the_same_in_a_larger_model(
    tool: str, build: Callable[[int], Any]
) -> None:
    run = TOOLS[tool]
    run(build(3))  # what is done once in a process
    models = [build(groups) for groups in (3, 6, 18)]
    few, some, many = (calls_of(lambda model=model: run(model)) for model in models)
    assert (many - few) / (18 - 3) < 1.05 * (some - few) / (6 - 3)
