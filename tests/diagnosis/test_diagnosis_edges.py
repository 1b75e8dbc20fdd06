"""diagnose where models, data and losses are not the usual ones."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import precision
from small_models import dense, shake

import truenorm as tn

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
    assert lost.remedy == 'tn.replace(model, to="truenorm")'
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
