"""Calls, sites, and rebuilding without an edit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from small_models import dense, inputs_for, nested, predict, residual, shake, snapshot, two_towers

from truenorm import ModelError, place
from truenorm._model.graph import calls, layer_paths
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import describe, site_calls

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
    assert [c.path for c in site_calls(two_towers())[0]] == ["bn", "bn#2"]


def test_a_site_says_what_is_around_it_across_nesting() -> None:
    sites, _ = site_calls(nested())
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
    assert describe(site_calls(dense(position=position))[0][0]).position == expected


def test_an_activation_inside_the_layer_before_counts() -> None:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, activation="relu"),
         keras.layers.BatchNormalization()]
    )  # fmt: skip
    assert describe(site_calls(model)[0][0]).position == "after_activation"


def test_a_preactivation_site() -> None:
    x = inputs = keras.Input((4, 4, 2))
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1)(x))
    assert describe(site_calls(model)[0][0]).position == "before_layer"


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


# --- what a copy must not lose -----------------------------------------------------------------


def test_adapted_preprocessing_is_carried() -> None:
    layer = keras.layers.Normalization()
    layer.adapt(np.array([[1.0, 10.0], [3.0, 50.0]]))
    model = keras.Sequential([keras.Input((2,)), layer, keras.layers.BatchNormalization()])
    x = np.array([[2.0, 40.0]], "float32")
    np.testing.assert_array_equal(predict(rebuild(model), x), predict(model, x))


def test_layers_frozen_inside_wrappers_stay_frozen() -> None:
    inner = keras.layers.Dense(2, name="inner")
    both = keras.layers.Bidirectional(keras.layers.LSTM(2))
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.TimeDistributed(inner), both])
    inner.trainable = False
    both.backward_layer.trainable = False
    copy = rebuild(model)
    assert [w.shape for w in copy.trainable_variables] == [
        w.shape for w in model.trainable_variables
    ]


class Constrained(keras.Model):
    """A functional model of a class of its own, with its own training step."""

    def train_step(self, *args: Any) -> Any:
        return super().train_step(*args)


def test_a_models_own_class_and_dtype_policy_are_kept() -> None:
    inputs = keras.Input((3,))
    model = Constrained(inputs, keras.layers.Dense(2)(inputs))
    model.dtype_policy = keras.DTypePolicy("mixed_float16")
    copy = rebuild(model)
    assert type(copy) is type(model)
    assert copy.dtype_policy == model.dtype_policy


class Complete(keras.Model):
    """A functional model that makes its own graph, and has its own training step."""

    def __init__(self) -> None:
        inputs = keras.Input((3,))
        self.temperature = 2.0
        batch_norm = keras.layers.BatchNormalization(name="bn")
        super().__init__(inputs, batch_norm(keras.layers.Dense(2)(inputs)), name="mine")
        self.last = batch_norm

    def train_step(self, *args: Any) -> Any:
        return super().train_step(*args)


def test_a_model_that_makes_its_own_graph_keeps_class_and_attributes() -> None:
    model = shake(Complete())
    copy = rebuild(model)
    assert type(copy) is Complete
    assert copy.temperature == 2.0
    assert copy.last is copy.get_layer("bn")
    assert copy.last is not model.last
    x = inputs_for(model)
    np.testing.assert_array_equal(predict(copy, x), predict(model, x))


def test_a_training_step_that_would_be_lost_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^The class of this model has its own train_step"):
        place(Complete(), "none")


def my_loss(y: Any, predicted: Any) -> Any:
    return keras.ops.mean(keras.ops.abs(y - predicted))


@pytest.mark.parametrize("loss", [my_loss, lambda y, p: keras.ops.mean((y - p) ** 2)])
def test_a_loss_of_the_users_own_is_carried(loss: Any) -> None:
    model = dense()
    model.compile(keras.optimizers.SGD(0.125), loss, metrics=[keras.metrics.MeanSquaredError()])
    copy = rebuild(model)
    x = inputs_for(model)
    assert set(copy.fit(x, np.ones((8, 3)), verbose=0).history) == {"loss", "mean_squared_error"}
    assert float(copy.optimizer.learning_rate) == 0.125
    assert copy.optimizer is not model.optimizer


def test_the_global_random_generators_are_left_alone() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dropout(0.5)])
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()
    rebuild(model)
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy


def test_layers_of_the_same_name_have_paths_of_their_own() -> None:
    class Twins(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (
                keras.Sequential([keras.layers.BatchNormalization(name="bn")], name="block")
                for _ in range(2)
            )

        def call(self, x: Any) -> Any:
            return self.b(self.a(x))

    model = Twins()
    model(np.zeros((2, 3), "float32"))
    paths = [path for path in layer_paths(model).values() if path.endswith("bn")]
    assert paths == ["block/bn", "block#2/bn"]


@pytest.mark.parametrize("by_name", [True, False])
def test_a_mask_is_seen_by_position_too(by_name: bool) -> None:
    inputs, keep = keras.Input((4, 3)), keras.Input((4,), dtype="bool")
    layer = keras.layers.BatchNormalization()
    outputs = layer(inputs, mask=keep) if by_name else layer(inputs, None, keep)
    (site,), _ = site_calls(keras.Model([inputs, keep], outputs))
    assert site.extras == ("mask",)
