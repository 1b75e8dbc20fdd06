"""inspect: what every site really did in each entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from models import dense, inputs_for, nested, residual, shake, snapshot, two_towers

import truenorm as tn

KINDS = ["keras", "truenorm"]
HEALTHY = {
    "fit": "batch + updates + learns",
    "evaluate": "moving",
    "predict": "moving",
    "model(x)": "moving",
    "model(x, training=True)": "batch + updates",
}
FROZEN = dict.fromkeys(HEALTHY, "moving")


def modes_of(model: Any, path: str, **data: Any) -> dict[str, str]:
    inspection = tn.inspect(model, **data)
    index = [site.path for site in inspection.sites].index(path)
    return {entry: modes[index].describe() for entry, modes in inspection.modes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_fit_and_the_others_choose_the_mode_by_themselves(kind: str) -> None:
    assert modes_of(residual(kind), "stem_bn") == HEALTHY


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_site_runs_on_moving_statistics_also_in_fit(kind: str) -> None:
    model = residual(kind)
    model.get_layer("a_bn").trainable = False
    assert modes_of(model, "a_bn") == FROZEN
    assert modes_of(model, "b_bn") == HEALTHY


def test_a_frozen_parent_freezes_its_sites() -> None:
    model = nested()
    model.get_layer("backbone").trainable = False
    assert modes_of(model, "backbone/c_bn") == FROZEN
    assert modes_of(model, "head_model/bn") == HEALTHY


def test_no_gamma_and_beta_learn_nothing() -> None:
    model = keras.Sequential(
        [keras.Input((4,)),
         keras.layers.BatchNormalization(scale=False, center=False, name="bn"),
         keras.layers.Dense(1)]
    )  # fmt: skip
    assert modes_of(model, "bn")["fit"] == "batch + updates"


@pytest.mark.parametrize("build", [dense, residual, nested, two_towers])
def test_the_model_is_unchanged(build: Callable[[], Any]) -> None:
    model = shake(build())
    losses = {"class": "mse", "score": "mse"} if build is two_towers else "mse"
    model.compile("adam", losses)
    before = snapshot(model)
    state = np.random.get_state()[1].copy()
    tn.inspect(model)
    assert snapshot(model) == before
    assert np.array_equal(np.random.get_state()[1], state)


def test_the_models_own_loss_is_used_with_targets() -> None:
    model = dense()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = inputs_for(model)
    assert modes_of(model, "bn", x=x, y=np.zeros(8, "int32")) == HEALTHY


def test_targets_without_a_loss_are_refused() -> None:
    model = dense()
    with pytest.raises(tn.DataError, match="Targets are given, but the model has no loss"):
        tn.inspect(model, inputs_for(model), np.zeros(8))
    with pytest.raises(tn.DataError, match="The data does not fit the model's inputs"):
        tn.inspect(model, np.zeros((3, 9), "float32"))


def test_it_prints_as_tables_and_goes_to_json() -> None:
    inspection = tn.inspect(residual())
    text = str(inspection)
    assert "4 sites: stem_bn, a_bn, … c_bn" in text
    assert "before_activation" in text
    plain = inspection.to_dict()
    assert plain["sites"][3]["path"] == "c_bn"
    assert plain["modes"]["fit"][0]["calls"][0]["statistics"] == "batch"
    assert "<table>" in inspection._repr_html_()


def test_a_layer_that_learns_is_seen_to_learn_in_half_precision() -> None:
    """Loss scaling would skip the first step."""
    policy = "mixed_float16"
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, dtype=policy),
         keras.layers.BatchNormalization(dtype=policy, name="bn"),
         keras.layers.Dense(1, dtype=policy, bias_initializer=keras.initializers.Constant(20.0))]
    )  # fmt: skip
    assert modes_of(model, "bn") == HEALTHY


def test_it_is_one_batch_whatever_the_number_of_samples() -> None:
    model = dense()
    fit = tn.inspect(model, inputs_for(model, 50)).modes["fit"][0]
    assert fit.describe() == "batch + updates + learns"
    assert fit.training == (True,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_flag_written_into_the_model_is_seen_to_lose(kind: str) -> None:
    """Keras 3.15: with the usual transfer-learning recipe the statistics move after all."""
    base = residual(kind)
    inputs = keras.Input((6, 6, 3))
    model = keras.Model(inputs, keras.layers.Dense(2)(base(inputs, training=False)))
    assert keras.__version__.startswith("3.15"), "later versions obey the flag: say so in README"
    assert modes_of(model, "residual/stem_bn") == HEALTHY
    base.trainable = False
    assert modes_of(model, "residual/stem_bn") == FROZEN
