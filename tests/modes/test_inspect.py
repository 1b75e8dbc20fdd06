"""inspect: what every site really did in each entry point."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from small_models import (
    dense,
    inputs_for,
    nested,
    residual,
    shake,
    snapshot,
    subclassed,
    two_towers,
)

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
    model.compile(keras.optimizers.Adam(), losses)
    model.optimizer.build(model.trainable_variables)

    def everything() -> Any:
        of_metrics = [v for metric in model.metrics for v in metric.variables]
        state = [*model.optimizer.variables, *of_metrics]
        values = [np.array(keras.ops.convert_to_numpy(v)).tobytes() for v in state]
        return snapshot(model), values, np.random.get_state()[1].tobytes(), random.getstate()

    before = everything()
    tn.inspect(model)
    assert everything() == before


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
    assert "<table" in inspection._repr_html_()


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


# --- surprises, each with its cause ------------------------------------------------------------


def codes(model: Any, *data: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for surprise in tn.inspect(model, *data).surprises:
        found.setdefault(surprise.path, []).append(surprise.code)
    return found


def test_a_model_that_does_what_one_expects_has_no_surprises() -> None:
    assert codes(residual("truenorm")) == {}
    assert codes(nested()) == {}


def test_the_causes_that_are_flags() -> None:
    """Traps 11 and 12."""
    model = nested("truenorm")
    model.compile("sgd", "mse")
    backbone = model.get_layer("backbone")
    backbone.trainable = False
    backbone.get_layer("b_bn").trainable = True
    model.get_layer("head_model").get_layer("bn").freeze = "affine"
    inspection = tn.inspect(model)
    assert codes(model) == {
        "backbone/stem_bn": ["changed_after_compile", "frozen_parent"],
        "backbone/a_bn": ["changed_after_compile", "frozen_parent"],
        "backbone/b_bn": ["parent_frozen_child_updates"],
        "backbone/c_bn": ["changed_after_compile", "frozen_parent"],
        "head_model/bn": ["policy"],
    }
    child = next(s for s in inspection.surprises if s.path == "backbone/b_bn")
    assert child.explanation == (
        "'backbone' is frozen, but this layer inside was made trainable again: its statistics "
        "move, gamma and beta are not learned"
    )
    assert "policy" in str(inspection)
    assert inspection.surprises[-1].explanation.endswith("gamma and beta stay as they are")
    single = residual()
    single.get_layer("a_bn").trainable = False
    assert codes(single) == {"a_bn": ["frozen"]}
    tn.freeze(model)
    assert "changed_after_compile" not in str(codes(model))


def test_the_causes_that_are_written_into_the_graph() -> None:
    """Trap 9, at the layer's own call and at that of a model around it."""
    inputs = keras.Input((6, 6, 3))
    off, on, after = (keras.layers.BatchNormalization(name=n) for n in ("off", "on", "after"))
    x = after(on(off(inputs, training=False), training=True))
    model = keras.Model(inputs, keras.layers.Dense(1)(residual()(x, training=False)))
    inspection = tn.inspect(model)
    assert codes(model) == {
        "off": ["baked_false_ignored"],
        "on": ["baked_true"],
        "after": ["bare_call_trains"],  # trap 19: the flag of the layer before it
        **{f"residual/{n}_bn": ["baked_false_ignored"] for n in ("stem", "a", "b", "c")},
    }
    off_cause, on_cause, after_cause, inner_cause = inspection.surprises[:4]
    assert off_cause.explanation.startswith("training=False is written into the model at its call")
    assert on_cause.explanation.endswith("so the batch normalises in model(x)")
    assert "'on' (BatchNormalization) before it has training=True" in after_cause.explanation
    assert "at the call of 'residual'" in inner_cause.explanation


def test_a_bare_call_behind_a_preprocessing_layer() -> None:
    """Trap 19."""
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Resizing(4, 4, name="resize"),
         keras.layers.BatchNormalization(name="bn")]
    )  # fmt: skip
    inspection = tn.inspect(model)
    assert inspection.modes["model(x)"][0].describe() == "batch + updates"
    (surprise,) = inspection.surprises
    assert surprise.code == "bare_call_trains"
    assert "'resize' (Resizing) before it has training=True" in surprise.explanation


class Forgetful(keras.Model):
    """Trap 10: its call has no ``training``."""

    def __init__(self) -> None:
        super().__init__(name="forgetful")
        self.bn = keras.layers.BatchNormalization(name="bn")
        self.drop = keras.layers.Dropout(0.5, name="drop")
        self.head = keras.layers.Dense(1, name="head")
        self.seen = keras.metrics.Mean(name="seen")
        self.second = keras.optimizers.SGD(momentum=0.9)
        self.notes = {"calls": [1]}

    def call(self, x: Any) -> Any:
        self.notes["calls"].append(1)
        return self.head(self.drop(self.bn(x)))


@pytest.fixture(scope="module")
def forgetful() -> Any:
    model = Forgetful()
    model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    model.fit(x, x[:, :1], verbose=0)
    model.predict(x, verbose=0)
    model.seen.update_state(3.0)
    return model


def test_a_subclassed_model_that_forgets_training(forgetful: Any) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    inspection = tn.inspect(forgetful, x)
    assert {e: m[0].describe() for e, m in inspection.modes.items()} == {
        **dict.fromkeys(HEALTHY, "moving"),
        "fit": "moving + learns",
        # Keras takes training= although call() does not, and hands it on to the layers inside.
        "model(x, training=True)": "batch + updates",
    }
    (surprise,) = inspection.surprises
    assert surprise.code == "call_without_training"
    assert "call() of Forgetful takes no argument 'training'" in surprise.explanation
    (site,) = inspection.sites
    assert (site.path, site.producer, site.consumers, site.channels) == ("bn", None, (), 3)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_subclassed_model_is_put_back_to_the_last_byte(
    forgetful: Any, error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")

    def everything() -> Any:
        of_metrics = [v for metric in forgetful.metrics for v in metric.variables]
        of_optimizers = [*forgetful.optimizer.variables, *forgetful.second.variables]
        state = [*forgetful.variables, *of_optimizers, *of_metrics, len(forgetful.notes["calls"])]
        values = [np.array(keras.ops.convert_to_numpy(v)).tobytes() for v in state]
        layers = forgetful._flatten_layers()
        attributes = [{k: id(v) for k, v in vars(layer).items()} for layer in layers]
        lists = [{k: list(map(id, v)) for k, v in vars(layer).items() if isinstance(v, list)}
                 for layer in layers]  # fmt: skip
        gradients = [getattr(v.value, "grad", None) for v in forgetful.variables]
        return snapshot(forgetful)[:5], values, attributes, lists, list(map(id, gradients))

    before = everything()
    if error is None:
        tn.inspect(forgetful, x)
        tn.inspect(forgetful, x, x[:, :1])
    else:

        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(forgetful), "predict", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tn.inspect(forgetful, x)
    assert everything() == before


def test_a_subclassed_model_needs_data_and_variables() -> None:
    with pytest.raises(tn.DataError, match=r"^A subclassed model does not say what its inputs are"):
        tn.inspect(subclassed())
    with pytest.raises(tn.ModelError, match=r"has no variables yet.*build the model, or call it"):
        tn.inspect(Forgetful(), np.ones((2, 3)))


def test_inside_a_wrapper_it_is_watched_too() -> None:
    inputs = keras.Input((4, 3))
    layer = keras.layers.BatchNormalization(name="in")
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer, name="steps")(inputs))
    assert modes_of(model, "steps/in") == HEALTHY


# --- entry points that cannot be run -----------------------------------------------------------


class Unusual(keras.Model):
    """Its call demands training; its training step, if it has one of its own, other data."""

    def __init__(self, own_step: bool = False) -> None:
        super().__init__(name="unusual")
        self.own_step = own_step
        self.bn = keras.layers.BatchNormalization(name="bn")
        self.head = keras.layers.Dense(4, name="head")

    def call(self, x: Any, training: Any) -> Any:
        return self.head(self.bn(x, training=training))

    def train_step(self, *arguments: Any) -> Any:
        if self.own_step:
            raise TypeError("this step wants a dictionary of images\nand nothing else")
        return super().train_step(*arguments)


X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
LABELS = np.arange(8) % 4
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def unusual(own_step: bool = False) -> Any:
    model = Unusual(own_step)
    model(X, training=False)
    model.compile("adam", CROSS_ENTROPY, metrics=["accuracy"])
    return model


@pytest.mark.parametrize("data", [(X,), (X, LABELS)], ids=["made-up targets", "labels"])
def test_metrics_of_the_model_do_not_matter_and_a_call_may_demand_training(data: Any) -> None:
    inspection = tn.inspect(unusual(), *data)
    missing = "TypeError: missing a required argument: 'training'"
    assert inspection.not_run == {"model(x)": missing}
    assert {entry: mode.describe() for entry, (mode,) in inspection.modes.items()} == {
        entry: mode for entry, mode in HEALTHY.items() if entry != "model(x)"
    }
    assert inspection.surprises == ()


def test_a_model_that_keeps_its_metrics_by_itself_is_run() -> None:
    """As those with a train_step of their own do: nobody updates the metrics of compile."""

    class Tracking(Forgetful):
        def compute_metrics(self, *data: Any, **_: Any) -> Any:
            self.seen.update_state(keras.ops.mean(data[2]))
            return {"seen": self.seen.result()}

    model = Tracking()
    model.compile("adam", "mse")
    model.fit(X, X[:, :1], verbose=0)
    assert tn.inspect(model, X).not_run == {}


def test_a_training_step_that_wants_other_data_costs_its_column_only() -> None:
    model = unusual(own_step=True)
    before = snapshot(model)[:5]
    inspection = tn.inspect(model, X, LABELS)
    assert snapshot(model)[:5] == before
    reason = "TypeError: this step wants a dictionary of images"
    assert inspection.not_run["fit"] == inspection.to_dict()["not_run"]["fit"] == reason
    assert inspection.modes.keys() == HEALTHY.keys() - {"fit", "model(x)"}
    table = inspection.tables()[1]
    assert table.columns == ("sites", *HEALTHY)
    assert table.rows == (("bn", "not run", "moving", "moving", "not run", "batch + updates"),)
    assert f"fit was not run: {reason}" in table.notes


def test_targets_that_the_loss_does_not_take_cost_two_columns() -> None:
    model = dense()
    model.compile("sgd", CROSS_ENTROPY)
    inspection = tn.inspect(model, inputs_for(model), np.zeros((8, 7)))
    assert inspection.not_run.keys() == {"fit", "evaluate"}
    assert inspection.modes["predict"][0].describe() == "moving"


def test_a_model_that_cannot_be_run_at_all_is_refused() -> None:
    class Broken(Unusual):
        def call(self, x: Any, training: Any = None) -> Any:
            if self.built and self.own_step:
                raise ValueError("no call at all")
            return super().call(x, training)

    model = Broken()
    model(X)
    model.own_step = True
    with pytest.raises(tn.ModelError, match=r"^The model could not be run in any way.*no call at"):
        tn.inspect(model, X)
