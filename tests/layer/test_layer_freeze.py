"""Freeze policies: what normalises, what moves and what learns in training under each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, tensor

from truenorm import BatchNormalization, OptionError

X = np.random.default_rng(5).normal(3, 2, (32, 4)).astype("float32")
Y = np.random.default_rng(6).normal(size=(32, 1)).astype("float32")
AFFINE, MOVING = {"gamma", "beta"}, {"moving_mean", "moving_variance"}
LEARN = {"none": AFFINE | MOVING, "all": set(), "statistics": AFFINE, "affine": MOVING}


def model(layer: Any) -> Any:
    network = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    network.compile(keras.optimizers.SGD(0.1), "mse")
    return network


def moved_in_fit(network: Any, layer: Any) -> set[str]:
    before = {w.name: array(w) for w in layer.weights}
    network.fit(X, Y, batch_size=32, verbose=0)
    return {w.name for w in layer.weights if (array(w) != before[w.name]).any()}


@pytest.mark.parametrize("policy", LEARN)
def test_fit_changes_what_the_policy_leaves_free(policy: Any) -> None:
    layer = BatchNormalization(freeze=policy, momentum=0.5)
    network = model(layer)
    assert layer.freeze == policy
    assert layer.trainable == (policy != "all")
    learnable = {v.path.split("/")[-1] for v in network.trainable_variables}
    assert learnable - {"kernel", "bias"} == LEARN[policy] & AFFINE
    assert moved_in_fit(network, layer) == LEARN[policy]
    # The order of the weights is that of files, whatever is frozen.
    assert [w.name for w in layer.weights] == ["gamma", "beta", "moving_mean", "moving_variance"]


@pytest.mark.parametrize("policy", LEARN)
def test_which_statistics_normalise(policy: Any) -> None:
    layer = BatchNormalization(freeze=policy)
    batch = policy in ("none", "affine")
    output = array(layer(tensor(X), training=True))
    expected = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-3) if batch else X / np.sqrt(1.001)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["statistics", "affine"])
def test_a_parent_does_not_thaw_what_the_layer_holds(policy: Any) -> None:
    layer = BatchNormalization(momentum=0.5)
    network = model(layer)
    layer.freeze = policy
    network.trainable = False
    assert layer.freeze == "all"
    assert network.trainable_variables == []
    network.trainable = True
    assert layer.freeze == policy
    network.compile(keras.optimizers.SGD(0.1), "mse")
    assert moved_in_fit(network, layer) == LEARN[policy]
    layer.freeze = "none"
    network.compile(keras.optimizers.SGD(0.1), "mse")
    assert moved_in_fit(network, layer) == AFFINE | MOVING


def test_all_is_trainable_false() -> None:
    layer = BatchNormalization(freeze="all")
    layer.build((None, 4))
    assert layer.trainable is False
    assert layer.trainable_variables == []
    layer.freeze = "affine"
    assert layer.trainable is True
    layer.freeze = "all"
    assert layer.get_config()["trainable"] is False
    layer.trainable = True
    assert layer.freeze == "affine"
    assert layer.trainable_variables == []


def test_config_holds_the_policy_only_where_there_is_one() -> None:
    stock = keras.layers.BatchNormalization().get_config()
    for policy in ("none", "all"):
        assert set(BatchNormalization(freeze=policy).get_config()) == set(stock)
    for policy in ("all", "statistics", "affine"):
        for trainable in (True, False):
            layer = BatchNormalization(freeze=policy, trainable=trainable)
            again = BatchNormalization.from_config(layer.get_config())
            assert again.freeze == layer.freeze == (policy if trainable else "all")
            again.trainable = layer.trainable = True
            assert again.freeze == layer.freeze


@pytest.mark.parametrize(
    "choose",
    [
        lambda: BatchNormalization(freeze="some"),  # type: ignore[arg-type]
        lambda: setattr(BatchNormalization(), "freeze", "some"),
    ],
)
def test_an_unknown_policy(choose: Callable[[], Any]) -> None:
    with pytest.raises(OptionError) as caught:
        choose()
    assert str(caught.value) == (
        "There is no such freeze policy of BatchNormalization (at 'freeze'). Expected: one of "
        "'none', 'all', 'statistics', 'affine'. Received: 'some'."
    )
