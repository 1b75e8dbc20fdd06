"""Calls, sites, and rebuilding without an edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from models import dense, inputs_for, nested, predict, residual, shake, snapshot, two_towers

from truenorm import ModelError
from truenorm._graph import calls, rebuild
from truenorm._sites import describe, site_calls

MODELS = [dense, residual, nested, two_towers]


@pytest.mark.parametrize("build", MODELS)
def test_rebuilt_without_an_edit_it_is_the_same_model(build: Callable[[], Any]) -> None:
    model = shake(build())
    before, x = snapshot(model), inputs_for(model)
    copy = rebuild(model)
    if build is not two_towers:  # Keras lists the calls of a shared layer in any order
        assert copy.get_config() == model.get_config()
    for ours, theirs in zip(predict(copy, x), predict(model, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert snapshot(model) == before
    assert not {id(layer) for layer in copy._flatten_layers()} & {
        id(layer) for layer in model._flatten_layers()
    }


def test_a_copy_can_be_trained_without_harm_to_the_original() -> None:
    """JAX donates buffers to a training step: shared ones would be lost."""
    model = shake(residual())
    model.compile("sgd", "mse")
    x = inputs_for(model)
    expected = predict(model, x)
    copy = rebuild(model)
    copy.fit(x, np.zeros((8, 3)), verbose=0)
    copy.predict(x, verbose=0)
    model.predict(x, verbose=0)
    np.testing.assert_array_equal(predict(model, x), expected)


def test_trainable_flags_and_compile_configuration_are_carried() -> None:
    model = nested()
    model.get_layer("backbone").trainable = False
    model.get_layer("backbone").get_layer("b_bn").trainable = True
    model.compile(keras.optimizers.SGD(0.125), "mae", metrics=["mse"])
    copy = rebuild(model)
    flags = [(layer.name, layer.trainable) for layer in model._flatten_layers()]
    assert [(layer.name, layer.trainable) for layer in copy._flatten_layers()] == flags
    assert float(copy.optimizer.learning_rate) == 0.125
    assert copy.loss == "mae"
    names = [w.path for w in model.trainable_variables]
    assert [w.path for w in copy.trainable_variables] == names


def test_calls_of_nested_and_shared_layers_have_paths() -> None:
    paths = [call.path for call in calls(nested())]
    assert paths[0] == "backbone/stem_conv"
    assert "head_model/silu" in paths
    assert [c.path for c in site_calls(two_towers())[1]] == ["bn", "bn#2"]


def test_a_site_says_what_is_around_it_across_nesting() -> None:
    _, sites = site_calls(nested())
    site = {call.path: describe(call) for call in sites}
    assert site["backbone/stem_bn"].position == "before_activation"
    assert site["backbone/stem_bn"].producer == "Conv2D stem_conv"
    assert site["backbone/b_bn"].position is None
    assert site["backbone/b_bn"].consumers == ("Add add",)
    assert site["head_model/bn"].channels == 4


@pytest.mark.parametrize(
    ("position", "expected"),
    [("before_activation", "before_activation"), ("after_activation", "after_activation")],
)
def test_the_position_of_a_site(position: str, expected: str) -> None:
    assert describe(site_calls(dense(position=position))[1][0]).position == expected


def test_an_activation_inside_the_layer_before_counts() -> None:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, activation="relu"),
         keras.layers.BatchNormalization()]
    )  # fmt: skip
    assert describe(site_calls(model)[1][0]).position == "after_activation"


def test_a_preactivation_site() -> None:
    x = inputs = keras.Input((4, 4, 2))
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1)(x))
    assert describe(site_calls(model)[1][0]).position == "before_layer"


def test_a_model_that_is_not_built_is_refused() -> None:
    model = keras.Sequential([keras.layers.Dense(2), keras.layers.BatchNormalization()])
    with pytest.raises(ModelError, match=r"has no input shape yet.*Remedy: build it first\.$"):
        calls(model)


def test_operations_that_are_not_layers_are_kept() -> None:
    inputs = keras.Input((4,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(3)(inputs))
    model = keras.Model(inputs, keras.ops.sum(keras.ops.relu(x) * 2.0, axis=1))
    x = inputs_for(model)
    np.testing.assert_array_equal(predict(rebuild(model), x), predict(model, x))
