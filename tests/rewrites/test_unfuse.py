"""Sums and activations inside a layer come behind it as layers: replace(to="keras") undoes fuse."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from fused_models import check_training, projected, receipt
from small_models import inputs_for, predict, residual, shake, snapshot

import truenorm as tn
from truenorm import BatchNormalization
from truenorm._rewrites import unfuse

L = keras.layers


def test_keras_layers_undo_it() -> None:
    """Names, functions and training are again those of the model that was fused."""
    model = shake(projected())
    x = inputs_for(model)
    rewrite = tn.replace(tn.replace(model, fuse=True).model, to="keras")
    new = rewrite.model
    own = "now keras's BatchNormalization"
    both = f"{own}, with Add and Activation behind it"
    assert receipt(rewrite) == {
        "bn": f"{own}, with Activation behind it", "0_bn": own, "3_bn": both, "b_bn": both,
    }  # fmt: skip
    kinds = {layer.name: type(layer) for layer in new.layers if "bn" in layer.name}
    assert kinds.pop("0_bn") is kinds.pop("3_bn") is kinds.pop("b_bn") is L.BatchNormalization
    assert kinds.pop("bn") is L.BatchNormalization
    assert kinds == {
        "3_bn_add": L.Add, "b_bn_add": L.Add, "bn_activation": L.Activation,
        "3_bn_activation": L.Activation, "b_bn_activation": L.Activation,
    }  # fmt: skip
    assert rewrite.max_site_error is not None
    assert rewrite.max_site_error < 1e-5
    np.testing.assert_allclose(predict(new, x)[0], predict(model, x)[0], atol=1e-4)
    check_training(model, new, x)
    assert len(tn.replace(new, fuse=True).model.layers) == 11


@pytest.mark.any_backend
@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("training", [False, True])
def test_a_way_back_that_is_none_is_refused(
    left_out: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the sum, or without the activation, be it in training only."""
    right = unfuse.through

    def wrong(chain: Any, layer: Any, args: Any, given: Any) -> Any:
        chain = [*chain]
        if given["training"] == training and len(chain) == 3:
            del chain[1 + left_out]
        return right(chain, layer, args, given)

    monkeypatch.setattr(unfuse, "through", wrong)
    fused = tn.replace(shake(residual()), fuse=True).model
    with pytest.raises(tn.VerificationError, match="b_bn"):
        tn.replace(fused, to="keras")


@pytest.mark.any_backend
@pytest.mark.parametrize("to", ["group", "layer", "affine"])
def test_a_fused_layer_becomes_another_with_its_sum_and_activation(to: Any) -> None:
    model = shake(projected())
    x = inputs_for(model)
    plain, fused = (tn.replace(m, to=to).model for m in (model, tn.replace(model, fuse=True).model))
    np.testing.assert_allclose(predict(fused, x)[0], predict(plain, x)[0], rtol=1e-5)


@pytest.mark.any_backend
def test_an_activation_that_no_graph_shows_stays() -> None:
    layer = BatchNormalization(activation="relu", name="bn")
    model = keras.Sequential([keras.Input((3, 4)), L.TimeDistributed(layer, name="td")])
    why = "it has an activation of its own inside, and no graph shows where that can go"
    for to, reason in (
        ("keras", "Keras's layer has nothing like its activation"), ("group", why), ("affine", why),
    ):  # fmt: skip
        assert receipt(tn.replace(model, to=to)) == {"td/bn": reason}


@pytest.mark.parametrize("tool", ["keras", "group", "affine", "fold"])
@pytest.mark.parametrize("kind", [L.LeakyReLU, L.PReLU])
def test_an_activation_that_is_a_layer_is_copied(tool: str, kind: Any) -> None:
    """By hand; the models share nothing, and the new one has the old one's numbers."""
    layer = BatchNormalization(activation=kind(), name="bn")
    before, behind = L.Dense(4, activation="tanh"), L.Dense(2, activation="tanh")
    model: Any = keras.Sequential([keras.Input((6,)), before, layer, L.Dropout(0.1), behind])
    x, inside = inputs_for(model), layer.activation
    change: Any = tn.fold if tool == "fold" else partial(tn.replace, to=tool)
    if not inside.built:
        why = "its activation is a layer without weights as yet: call the model once"
        assert receipt(change(model)) == {"bn": why}
    predict(shake(model), x)
    slope = np.float64(0.3 if kind is L.LeakyReLU else 0.0)
    for alpha in inside.weights:
        slope = np.array([-0.5, 0.1, 0.2, 0.3])
        alpha.assign(slope)
    old = snapshot(model)
    new = change(model).model
    copy = new.get_layer("bn_activation")
    assert type(copy) is kind
    assert copy is not inside
    if tool != "group":
        np.testing.assert_allclose(predict(new, x)[0], predict(model, x)[0], rtol=1e-4, atol=1e-5)
    h = np.random.default_rng(2).normal(size=(5, 4)).astype("float32")
    y = keras.ops.convert_to_numpy(copy(h))
    np.testing.assert_allclose(y, np.where(h > 0, h, h * slope), rtol=1e-5)
    new.compile("sgd", "mse")
    new.fit(x, np.ones((len(x), 2)), verbose=0)
    assert snapshot(model) == old


@pytest.mark.any_backend
def test_an_activation_that_is_a_layer_stays_in_its_wrapper() -> None:
    layer = BatchNormalization(activation=L.PReLU(), name="bn")
    model = keras.Sequential([keras.Input((3, 4)), L.Dense(4), L.TimeDistributed(layer, name="td")])
    predict(shake(model), inputs_for(model))
    assert receipt(tn.fold(model)) == {
        "td/bn": "its activation is a layer, which its wrapper calls for each step"
    }


@pytest.mark.any_backend
@pytest.mark.parametrize("to", ["keras", "affine"])
def test_a_sum_of_another_layer_than_fuse_made_is_put_behind_it_too(to: Any) -> None:
    """In one call of two, with other activations, and names that are taken."""
    inputs = keras.Input((6,), name="bn_add")
    layer = BatchNormalization(name="bn", activation="tanh")
    x = layer(L.Dense(6)(layer(inputs, add=inputs, training=False)))
    model = shake(keras.Model(inputs, L.Dense(2, name="bn_activation")(x)))
    x = inputs_for(model)
    new = tn.replace(model, to=to).model
    assert {"bn", "bn_add_", "bn_activation_"} <= {layer.name for layer in new.layers}
    np.testing.assert_allclose(predict(new, x)[0], predict(model, x)[0], atol=1e-5)
