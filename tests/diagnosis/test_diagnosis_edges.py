"""diagnose where models, data and losses are not the usual ones."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import precision
from small_models import dense, shake, subclassed

import truenorm as tn

pytestmark = pytest.mark.any_backend

L = keras.layers
DATA = np.random.default_rng(3).normal(1.0, 2.0, (64, 4)).astype("float32")


def test_endless_data_is_refused_before_it_is_read() -> None:
    class Endless(keras.utils.PyDataset):
        num_batches = None

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read")

    message = (
        r"^This data has no end \(at 'data'\)\. Remedy: give a part of it: dataset\.take\(100\), "
        r"or a list of some batches\.$"
    )
    with pytest.raises(tn.DataError, match=message):
        tn.diagnose(shake(dense()), Endless(), select="TN103")


def test_batches_may_hold_sequences_of_different_lengths() -> None:
    inputs = keras.Input((None, 4))
    hidden = L.Dense(3)(L.BatchNormalization(name="bn")(inputs))
    model = keras.Model(inputs, L.BatchNormalization(name="after")(hidden))
    random = np.random.default_rng(0)
    data = [random.normal(5.0, 2.0, (8, 3 + n % 3, 4)).astype("float32") for n in range(9)]
    (finding,) = tn.diagnose(model, data, select="TN101").findings[:1]
    rows = np.concatenate([batch.reshape(-1, 4) for batch in data])
    right = np.abs(rows.mean(0)) / np.sqrt(rows.var(0) + 1e-3)
    assert finding.site == "bn"
    assert finding.evidence["mean_off_by_std"] == pytest.approx(right.max(), rel=1e-4)
    assert tn.diagnose(model, data).findings


def test_integers_are_normalised_as_numbers() -> None:
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), L.BatchNormalization(name="bn"), L.Dense(1)]
    )
    counts = np.random.default_rng(0).poisson(9.0, (64, 4)).astype("int32")
    (finding,) = tn.diagnose(model, counts, select="TN101", batch_size=32).findings
    right = np.abs(counts.mean(0)) / np.sqrt(counts.var(0) + 1e-3)
    assert finding.evidence["mean_off_by_std"] == pytest.approx(right.max(), rel=1e-4)


def test_a_batch_whose_size_is_written_into_the_model_is_left_whole() -> None:
    inputs = keras.Input((3, 4), batch_size=8)
    x = L.BatchNormalization(name="bn", trainable=False)(inputs)
    model = keras.Model(inputs, L.Dense(1)(keras.ops.reshape(x, (8, 12))))
    batches = [np.ones((8, 3, 4), "float32")]
    assert [f.site for f in tn.diagnose(model, batches, select="TN404").findings] == ["bn"]


# --- losses ------------------------------------------------------------------------------------


def off(*names: str) -> Any:
    """A dense layer per name on a BatchNormalization whose statistics are far off."""
    inputs = keras.Input((4,))
    batch_norm = L.BatchNormalization(name="bn")
    x = batch_norm(inputs)
    outputs = [L.Dense(1, kernel_initializer="ones", name=name)(x) for name in names]
    model = keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0])
    batch_norm.moving_variance.assign([100.0] * 4)
    return model


def labels_of(model: Any) -> Any:
    """What the model gives with the statistics of the data."""
    right = keras.models.clone_model(model)
    right.set_weights(model.get_weights())
    tn.recalibrate(right, DATA)
    return right.predict(DATA, verbose=0)


@pytest.mark.parametrize("names", [("only",), ("left", "right")])
def test_a_loss_may_be_given_by_the_names_of_outputs(names: tuple[str, ...]) -> None:
    model = off(*names)
    model.compile("sgd", dict.fromkeys(names, "mse"))
    y = labels_of(model)
    (finding,) = tn.diagnose(model, DATA, y, select="TN110", batch_size=32).findings
    assert finding.evidence["loss_in_inference"] > 2 * finding.evidence["loss_recalibrated"]


def without_a_loss() -> tuple[Any, Any]:
    model = off("only")
    model.compile("sgd", metrics=["mae"])
    return model, np.zeros((64, 1))


def with_labels_for_something_else() -> tuple[Any, Any]:
    model = off("only")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, np.zeros((64, 7, 2))


@pytest.mark.parametrize("case", [without_a_loss, with_labels_for_something_else])
def test_without_a_loss_that_can_be_computed_the_outputs_are_compared(case: Any) -> None:
    model, y = case()
    (finding,) = tn.diagnose(model, DATA, y, select="TN110", batch_size=32).findings
    assert set(finding.evidence) == {"outputs_differ_by"}


def with_logits() -> tuple[Any, Any, Any]:
    """It has learned with logits; its moving statistics have not arrived."""
    x = np.random.default_rng(0).normal(3.0, 2.0, (256, 4)).astype("float32")
    y = (x[:, 0] > 3).astype("int32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(8), L.BatchNormalization(name="bn"), L.ReLU(), L.Dense(2)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss)
    model.fit(x, y, epochs=3, batch_size=32, verbose=0)
    return model, x, y


@pytest.mark.parametrize(
    "loss",
    ["sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy(),
     keras.losses.sparse_categorical_crossentropy],
    ids=["name", "object", "function"],
)  # fmt: skip
def test_a_loss_that_takes_probabilities_says_nothing_of_logits(loss: Any) -> None:
    model, x, y = with_logits()
    told = {f.code for f in tn.diagnose(model, x, y, select="TN1").findings}
    assert {"TN102", "TN110"} <= told
    model.compile(loss=loss)
    found = tn.diagnose(model, x, y, select="TN1")
    assert {f.code for f in found.findings} >= {"TN102", "TN110"}
    (skipped,) = found.skipped
    assert skipped.codes == ("the loss",)
    assert skipped.reason.startswith("it takes probabilities, and the model puts out numbers below")


def test_a_layer_may_be_called_a_varying_number_of_times() -> None:
    class Varying(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.head = L.BatchNormalization(name="bn"), L.Dense(1)

        def call(self, x: Any, training: bool | None = None) -> Any:
            for _ in range(2 if x.shape[0] == 8 else 1):
                x = self.bn(x, training=training)
            return self.head(x)

    model = Varying()
    model(DATA)
    for first, second in ((8, 4), (4, 8)):
        batches = [DATA[:first], DATA[:second]]
        assert tn.diagnose(model, batches, select="TN307").checked == ("TN307",)


# --- statistics --------------------------------------------------------------------------------


def far(layer: Any, mean: float, variance: float = 1.0) -> Any:
    model = keras.Sequential([keras.Input((4,)), layer, L.Dense(1)])
    layer.moving_mean.assign([mean] * 4)
    layer.moving_variance.assign([variance] * 4)
    return model


def test_digits_are_lost_by_stock_layers_below_float64_only() -> None:
    (lost,) = tn.diagnose(far(L.BatchNormalization(), 5e3), select="TN106").findings
    assert lost.remedy == 'model = tn.replace(model, to="truenorm").model'
    assert not tn.diagnose(far(tn.BatchNormalization(), 5e3), select="TN106").findings
    with precision("float64"):
        wide = L.BatchNormalization(dtype="float64")
        assert not tn.diagnose(far(wide, 5e3), select="TN106").findings
    (huge,) = tn.diagnose(far(tn.BatchNormalization(), 0.0, 1e13), select="TN106").findings
    assert huge.remedy == "keras.layers.Normalization() before the model"


def test_a_constant_channel_without_epsilon_hides_no_other() -> None:
    layer = L.BatchNormalization(epsilon=0.0, name="bn")
    data = DATA.copy()
    data[:, 0] = 2.0
    model = far(layer, 9.0, 4.0)
    (finding,) = tn.diagnose(model, data, select=["TN103", "TN104"], batch_size=32).findings
    assert finding.code == "TN104"
    layer.moving_mean.assign(0.5 * data.mean(0))
    layer.moving_variance.assign(0.5 + 0.5 * data.var(0))
    (finding,) = tn.diagnose(model, data, select="TN102", batch_size=32).findings
    assert finding.evidence["initial_share"] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("noise", [L.Dropout(0.5), L.GaussianNoise(1.0), L.SpatialDropout1D(0.5)])
def test_behind_what_works_in_training_only_the_data_is_not_to_blame(noise: Any) -> None:
    model = keras.Sequential([keras.Input((3, 4)), noise, L.BatchNormalization(name="bn")])
    model.layers[-1].moving_mean.assign([9.0] * 4)
    data = np.repeat(DATA[:, None], 3, axis=1)
    found = tn.diagnose(model, data, select=["TN103", "TN104"], batch_size=32).findings
    assert [f.code for f in found] == ["TN103"]


# --- what the user holds -----------------------------------------------------------------------


@pytest.mark.parametrize("build", [dense, subclassed])
def test_arrays_that_the_user_holds_are_left(build: Any) -> None:
    """JAX deletes what is given away to a compiled program."""
    model = build()
    model.compile("sgd", "mse")
    width = 5 if build is dense else 3
    x = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=(64, width)), "float32")
    y = keras.ops.convert_to_tensor(np.zeros((64, 3)), "float32")
    held = [x, y, *(variable.value for variable in model.variables)]
    before = [np.array(keras.ops.convert_to_numpy(array)) for array in held]
    tn.diagnose(model, x, y, batch_size=8)
    tn.recalibrate(model, x, upstream="population").undo()
    for array, value in zip(held, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(array), value)


# --- what cannot be run ------------------------------------------------------------------------


class Classifier(keras.Model):
    """A subclassed model: inspect runs it itself."""

    def __init__(self) -> None:
        super().__init__(name="classifier")
        self.first, self.bn, self.head = L.Dense(8), L.BatchNormalization(name="bn"), L.Dense(3)

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.head(self.bn(self.first(x), training=training))


class OwnStep(Classifier):
    """Its training wants other data than inputs and targets."""

    def train_step(self, *arguments: Any) -> Any:
        raise NotImplementedError("give me triplets\nand nothing else")


LABELS = np.arange(64) % 3


def classifier(kind: type[Classifier] = Classifier) -> Any:
    model = kind()
    model(DATA)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    return model


def test_a_classifier_with_integer_labels_is_diagnosed_whole() -> None:
    diagnosis = tn.diagnose(classifier(), DATA, LABELS, batch_size=8)
    (skipped,) = diagnosis.skipped
    assert skipped.reason == "the model is subclassed, so its graph cannot be read"
    assert {"TN101", "TN107", "TN110", "TN401", "TN409"} <= set(diagnosis.checked)


def test_a_training_step_that_wants_other_data_costs_the_rules_about_modes() -> None:
    model = classifier(OwnStep)
    before = [np.array(w) for w in model.get_weights()]
    diagnosis = tn.diagnose(model, DATA, LABELS, batch_size=8)
    reasons = {s.reason: s.codes for s in diagnosis.skipped}
    (reason,) = [r for r in reasons if r.startswith("inspect could not run the model")]
    assert reason.endswith("(NotImplementedError: give me triplets)")
    assert reasons[reason] == ("TN107", *(f"TN40{i}" for i in range(1, 10)))
    assert {"TN101", "TN108", "TN110"} <= set(diagnosis.checked)
    assert "TN101" in {f.code for f in diagnosis.findings}
    assert all(map(np.array_equal, model.get_weights(), before))
    # What the modes are is not known, and neither whether the statistics are what it learned with.
    (unsure,) = tn.diagnose(model, DATA, select="TN101", batch_size=8).findings
    assert unsure.remedy == "tn.diagnose(model, data, y)"
    (sure,) = tn.diagnose(model, DATA, LABELS, select="TN101", batch_size=8).findings
    assert sure.remedy == "tn.recalibrate(model, data)"
    model.compile("sgd", metrics=["accuracy"])  # no loss to judge by
    (careful,) = tn.diagnose(model, DATA, LABELS, select="TN101", batch_size=8).findings
    assert careful.remedy == (
        "tn.recalibrate(model, data); and its undo(), if the model does worse"
    )


def test_a_frozen_layer_holds_its_statistics_also_where_nothing_can_be_run() -> None:
    model = classifier(OwnStep)
    model.bn.trainable = False
    assert not tn.diagnose(model, DATA, select="TN1", batch_size=8, ignore="TN107").findings
