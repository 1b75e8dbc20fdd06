"""place: functions as activations, pre-activation, insertion and removal, and what is left."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from models import inputs_for, predict, shake, snapshot

import truenorm as tn
from truenorm._graph import calls
from truenorm._sites import describe, site_calls

L = keras.layers


def names(model: Any) -> list[str]:
    """Layers and operations in the order of execution."""
    return [call.operation.name for call in calls(model)]


def positions(model: Any) -> list[str | None]:
    return [describe(call).position for call in site_calls(model)[0]]


# --- functions ---------------------------------------------------------------------------------

FUNCTIONS = [
    keras.ops.relu, keras.activations.relu, keras.activations.silu, keras.activations.gelu,
    keras.ops.leaky_relu, keras.ops.tanh, keras.ops.hard_sigmoid, keras.activations.softplus,
]  # fmt: skip


def functions() -> Any:
    """Dense, BatchNormalization and a function that is no layer, for several functions."""
    x = inputs = keras.Input((5,))
    for function in FUNCTIONS:
        x = function(L.BatchNormalization()(L.Dense(4)(x)))
    return keras.Model(inputs, L.Dense(2)(x))


def test_functions_are_activations_there_and_back() -> None:
    model = shake(functions())
    before, x = snapshot(model), inputs_for(model)
    assert positions(model) == ["before_activation"] * len(FUNCTIONS)
    there = tn.place(model, "after_activation")
    assert not there.left
    assert positions(there.model) == ["after_activation"] * len(FUNCTIONS)
    back = tn.place(there.model, "before_activation").model
    assert back.get_config() == model.get_config()
    for ours, theirs in zip(predict(back, x), predict(model, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert snapshot(model) == before


def test_a_function_keeps_its_settings_and_sees_the_dense_layers_output() -> None:
    """By hand in float64: dense, leaky ReLU, then the normalisation."""
    inputs = keras.Input((5,))
    x = L.BatchNormalization(name="bn")(L.Dense(4, name="d")(inputs))
    model = shake(keras.Model(inputs, L.Identity()(keras.ops.leaky_relu(x, negative_slope=0.5))))
    x = inputs_for(model)
    kernel, bias = (np.float64(w.numpy()) for w in model.get_layer("d").weights)
    gamma, beta, mean, variance = (np.float64(w.numpy()) for w in model.get_layer("bn").weights)
    h = x @ kernel + bias
    h = (np.where(h > 0, h, h / 2) - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    moved = tn.place(model, "after_activation").model
    np.testing.assert_allclose(predict(moved, x)[0], h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function", [keras.ops.exp, keras.ops.softmax, keras.activations.glu, lambda x: 2.0 * x]
)
def test_arithmetic_is_no_activation(function: Any) -> None:
    inputs = keras.Input((5,))
    x = function(L.BatchNormalization()(L.Dense(4)(inputs)))
    model = keras.Model(inputs, L.Dense(2)(x))
    assert positions(model) == [None]
    left = tn.place(model, "after_activation").left
    assert [k.reason.split(", but by ")[0] for k in left] == [
        "not directly followed by an activation"
    ]
