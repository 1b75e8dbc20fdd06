"""Layers that are quantised or have LoRA enabled: not folded into, carried by every rewrite."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import truenorm as tn

L: Any = keras.layers
X = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")


@pytest.fixture(params=["int8", "lora"])
def model(request: pytest.FixtureRequest) -> Any:
    """Its first layer is of that kind; the statistics are not those of a new layer."""
    first, site = L.Dense(6, name="first"), L.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((8,)), first, site, L.ReLU(), L.Dense(3)])
    site.moving_mean.assign(np.arange(6) / 5)
    site.moving_variance.assign(np.arange(1, 7) / 3)
    if request.param == "int8":
        first.quantize("int8")
    else:
        first.enable_lora(2)
        first.lora_kernel_b.assign(np.full((2, 6), 0.1))
    return model


def of_its_kind(layer: Any) -> tuple[Any, ...]:
    return layer.dtype_policy.name, getattr(layer, "quantization_mode", None), layer.lora_enabled


def test_fold_leaves_the_site_and_says_why(model: Any) -> None:
    done = tn.fold(model)
    (left,) = done.left
    assert "Dense first is quantised or has LoRA enabled" in left.reason
    np.testing.assert_array_equal(
        done.model.predict(X, verbose=0), model.predict(X, verbose=0), strict=True
    )


def test_replace_keeps_the_layer_and_the_function(model: Any) -> None:
    new = tn.replace(model, to="truenorm").model
    assert of_its_kind(new.get_layer("first")) == of_its_kind(model.get_layer("first"))
    np.testing.assert_allclose(
        new.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6
    )


def test_place_keeps_the_layer(model: Any) -> None:
    new = tn.place(model, "after_activation").model
    assert [type(layer).__name__ for layer in new.layers[:3]] == [
        "Dense",
        "ReLU",
        "BatchNormalization",
    ]
    assert of_its_kind(new.get_layer("first")) == of_its_kind(model.get_layer("first"))
    for old, kept in zip(
        model.get_layer("first").get_weights(), new.get_layer("first").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(kept, old, strict=True)


@pytest.mark.parametrize("how", ["int8", "int4", "lora"])
def test_removal_gives_it_no_bias(how: str) -> None:
    first = L.Dense(6, use_bias=False, name="first")
    model = keras.Sequential([keras.Input((8,)), first, L.BatchNormalization(), L.ReLU()])
    first.enable_lora(2) if how == "lora" else first.quantize(how)
    (changed,) = (done := tn.place(model, "none")).changed
    assert changed.what == (
        "removed; Dense first stays without bias: it is quantised or has LoRA enabled"
    )
    kept = done.model.get_layer("first")
    assert of_its_kind(kept) == of_its_kind(first)
    for old, new in zip(first.get_weights(), kept.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old, strict=True)


def test_recalibrate_finds_the_moments_behind_it(model: Any) -> None:
    before = keras.Model(model.inputs, model.get_layer("first").output).predict(X, verbose=0)
    tn.recalibrate(model, X)
    site = model.get_layer("bn")
    mean, variance = (
        keras.ops.convert_to_numpy(v) for v in (site.moving_mean, site.moving_variance)
    )
    np.testing.assert_allclose(mean, before.mean(0, dtype="float64"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, before.var(0, dtype="float64"), rtol=1e-4)
