"""Conversions as variants of a study, by their names."""

from __future__ import annotations

import re
from typing import Any

import keras
import pytest
from test_variants import build, data

import truenorm as tn
from truenorm._layer.frozen_affine import FrozenAffine
from truenorm._study.experiment import study
from truenorm._study.variants import Variant

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("group:1", keras.layers.GroupNormalization),
        ("layer", keras.layers.LayerNormalization),
        ("affine", FrozenAffine),
        ("truenorm", tn.BatchNormalization),
    ],
)
def test_a_conversion_is_a_variant_by_its_name(name: str, kind: Any) -> None:
    model = Variant(name, learning_rate=0.5).applied(build())
    assert type(model.layers[1]) is kind
    assert getattr(model.layers[1], "groups", 1) == 1
    assert model.compiled
    assert float(model.optimizer.learning_rate) == 0.5


def test_a_study_of_positions_and_conversions() -> None:
    names = ("before_activation", "group:1", "layer", "none")
    options: dict[str, Any] = {"epochs": 1, "seeds": 2, "runner": "here", "batch_size": 16}
    done = study(build, data, variants=names, **options)
    assert {trial.position: trial.sites for trial in done.trials} == {
        "before_activation": 1, "group:1": 0, "layer": 0, "none": 0
    }  # fmt: skip
    assert all(trial.error is None for trial in done.trials)
    assert len({trial.start for trial in done.trials if trial.seed == 0}) == 1


def test_what_a_conversion_leaves_is_said_before_training() -> None:
    options: dict[str, Any] = {"epochs": 1, "seeds": 2, "runner": "here"}
    with pytest.raises(tn.ModelError) as caught:
        study(one_channel, data, variants=("none", "layer"), **options)
    assert str(caught.value) == (
        "No BatchNormalization of this model can be converted to layer (at 'only'). Received: it "
        "has one channel, which would be constant."
    )


def one_channel() -> Any:
    layers = [keras.layers.Dense(1), keras.layers.BatchNormalization(name="only")]
    after = [keras.layers.ReLU(), keras.layers.Dense(2, "softmax")]
    model = keras.Sequential([keras.Input((4,)), *layers, *after])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gruop", "There is no such variant (at 'variants'). Expected: a position, truenorm, "
         "keras, group, layer, affine, or group:32, with a number of groups. Received: 'gruop'. "
         "Remedy: write group."),
        ("group:many", "There is no such variant (at 'variants')"),
        ("layer:2", "There is no such variant (at 'variants')"),
        ("group:2", "This number of groups does not divide the channels (at 'batch_normalization"),
        ("group:0", "groups must be a positive integer. Received: 0"),
        ("elsewhere", "There is no such position"),
    ],
)  # fmt: skip
def test_a_conversion_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(tn.OptionError, match=f"^{re.escape(message)}"):
        Variant(name).applied(build())
