"""callbacks.Monitor: its numbers, what it warns of, and that it changes nothing."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from small_models import nested, subclassed, two_towers

import truenorm as tn
from truenorm._records.monitoring import QUANTITIES

BACKEND = keras.config.backend()
L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 2.0, size=(64, 4)).astype("float32")
MOMENTUM, EPSILON, BATCH = 0.9, 1e-3, 16


def network(layer: Any = None, rate: float = 0.01, **compiled: Any) -> Any:
    """The layer first, so that its batches are those of the data."""
    layer = layer or L.BatchNormalization(name="bn", momentum=MOMENTUM)
    model = keras.Sequential([keras.Input((4,)), layer, L.Dense(4)])
    model.compile(keras.optimizers.SGD(rate), "mse", **compiled)
    return model


def watch(model: Any, x: Any = X, epochs: int = 1, **options: Any) -> tn.Monitoring:
    monitor = tn.callbacks.Monitor(**options)
    y = np.zeros((len(x), 4), "float32")
    model.fit(x, y, epochs=epochs, batch_size=BATCH, shuffle=False, callbacks=[monitor], verbose=0)
    assert monitor.history is not None
    return monitor.history


def batches(x: Any = X) -> list[np.ndarray]:
    return [np.float64(x[i : i + BATCH]) for i in range(0, len(x), BATCH)]


def averages(steps: int, momentum: float = MOMENTUM) -> tuple[np.ndarray, np.ndarray]:
    """Moving mean and variance after so many batches, in float64."""
    mean, variance = np.zeros(4), np.ones(4)
    for batch in batches()[:steps]:
        mean = momentum * mean + (1 - momentum) * batch.mean(0)
        variance = momentum * variance + (1 - momentum) * batch.var(0)
    return mean, variance


def error(moving: tuple[np.ndarray, np.ndarray], batch: np.ndarray) -> float:
    """Of an output by the moving statistics from one by the batch's, over this, value by value."""
    right = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + EPSILON)
    wrong = (batch - moving[0]) / np.sqrt(moving[1] + EPSILON)
    return float(np.sqrt(np.mean((wrong - right) ** 2) / np.mean(right**2)))


# --- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [L.BatchNormalization, tn.BatchNormalization])
def test_the_numbers_are_those_of_the_trainings_own_batches(kind: Any) -> None:
    seen = watch(network(kind(name="bn", momentum=MOMENTUM), rate=1e-5))  # gamma stays near 1
    assert (seen.layers, seen.channels, seen.epochs, seen.steps) == (("bn",), (4,), (0,), (4,))
    third, fourth = batches()[2:]
    errors = [error(averages(2), third), error(averages(3), fourth)]
    assert seen.values["distance"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
    variance = (third.var(0) + fourth.var(0)) / 2
    noise = np.sqrt(np.mean((third.mean(0) - fourth.mean(0)) ** 2 / 2 / variance))
    assert seen.values["noise"] == pytest.approx(noise, rel=1e-4)
    assert seen.values["dead"] == 0
    assert np.isnan(seen.values["clipped"]).all()
    assert seen.modes == (("batch + updates + learns",),)
    assert seen.findings == ()


def test_the_cumulative_average_tells_the_same() -> None:
    seen = watch(network(tn.BatchNormalization(name="bn", momentum=None)))
    *_, third, fourth = batches()
    noise = np.sqrt(
        np.mean(
            (third.mean(0) - fourth.mean(0)) ** 2
            / (third.var(0) + fourth.var(0))
            * (BATCH - 1) / BATCH  # its variances are unbiased
        )
    )  # fmt: skip
    assert seen.values["noise"] == pytest.approx(noise, rel=1e-3)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has no steps_per_execution")
def test_several_steps_at_once_give_the_noise_of_one_batch() -> None:
    """The averages of two batches each: as noisy as their weights say."""
    model = network(steps_per_execution=2)
    seen = watch(model)
    assert seen.steps == (4,)
    weights = np.array([MOMENTUM, 1]) / (1 + MOMENTUM)
    means = [b.mean(0) for b in batches()]
    pairs = [weights[0] * a + weights[1] * b for a, b in (means[:2], means[2:])]
    together = 2 * np.sum(weights**2)
    spans = [b.var(0) for b in batches()]
    variance = np.mean([weights[0] * a + weights[1] * b for a, b in (spans[:2], spans[2:])], axis=0)
    noise = np.sqrt(np.mean((pairs[0] - pairs[1]) ** 2 / together / variance))
    assert seen.values["noise"] == pytest.approx(noise, rel=1e-4)


def test_renorm_that_is_clipped_is_counted() -> None:
    clipping = {"rmax": 1.5, "rmin": 0.5, "dmax": 100.0}
    layer = L.BatchNormalization(
        name="bn", renorm=True, renorm_clipping=clipping, renorm_momentum=MOMENTUM
    )
    x = X * np.array([1, 0.5, 0.005, 0.2], "float32")  # deviations 2, 1, 0.01, 0.4 against about 1
    seen = watch(network(layer), x)
    deviations, clipped = np.sqrt(np.ones(4) + 0), list[float]()
    for batch in batches(x):
        own = np.sqrt(batch.var(0) + EPSILON)
        r = own / deviations
        clipped.append(float(np.mean((r > 1.5) | (r < 0.5))))
        deviations = MOMENTUM * deviations + (1 - MOMENTUM) * own
    assert 0 < np.mean(clipped[2:]) < 1
    assert seen.values["clipped"] == pytest.approx(np.mean(clipped[2:]))


@pytest.mark.filterwarnings("ignore:TN202")
def test_dead_channels_are_those_without_gamma_or_variance() -> None:
    model = network()
    model.get_layer("bn").gamma.assign([1.0, 1.0, 1e-5, 1.0])
    x = X.copy()
    x[:, 0] = 7.0
    seen = watch(model, x)
    assert seen.values["dead"] == 0.5
    *_, third, fourth = batches(x[:, 1:])  # rounding of the constant one is no noise
    between = (third.mean(0) - fourth.mean(0)) ** 2 / (third.var(0) + fourth.var(0))
    assert seen.values["noise"] == pytest.approx(np.sqrt(between.mean()), rel=1e-4)


def test_a_shared_layer_takes_two_steps_per_batch() -> None:
    model = two_towers("truenorm")
    model.get_layer("bn").momentum = MOMENTUM
    outputs = {"class": np.zeros((32, 2)), "score": np.zeros((32, 1))}
    image = RNG.normal(size=(8, 6, 6, 3)).astype("float32")
    x = {"left": np.tile(image, (4, 1, 1, 1)), "right": np.tile(image, (4, 1, 1, 1))}
    model.compile(keras.optimizers.SGD(0.0), "mse")
    monitor = tn.callbacks.Monitor()
    model.fit(x, outputs, batch_size=8, shuffle=False, callbacks=[monitor], verbose=0)
    assert monitor.history is not None
    assert monitor.history.values["noise"][0, 0] < 1e-3  # every batch is the same


@pytest.mark.parametrize(
    ("every", "epochs", "steps"),
    [(None, (0, 1), (4, 8)), (3, (0, 0, 1), (2, 4, 8)), (2, (0, 0, 1, 1), (2, 4, 6, 8)),
     (100, (0,), (2,))],
)  # fmt: skip
def test_when_it_looks(every: int | None, epochs: Any, steps: Any) -> None:
    seen = watch(network(), epochs=2, every=every)
    assert (seen.epochs, seen.steps) == (epochs, steps)


def data() -> Iterator[Any]:
    for batch in batches():
        yield batch.astype("float32"), np.zeros((BATCH, 4), "float32")


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_of_unknown_length_is_looked_at_at_once() -> None:
    monitor = tn.callbacks.Monitor()
    network().fit(data(), shuffle=False, callbacks=[monitor], verbose=0)
    assert monitor.history is not None
    assert monitor.history.steps == (2,)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="of tf.data")
def test_data_of_unknown_length_is_known_after_an_epoch() -> None:
    import tensorflow as tf

    shape = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 4)))
    monitor = tn.callbacks.Monitor()
    source = tf.data.Dataset.from_generator(data, output_signature=shape)
    network().fit(source, epochs=2, shuffle=False, callbacks=[monitor], verbose=0)
    assert monitor.history is not None
    assert monitor.history.steps == (2, 8)


# --- that nothing changes ----------------------------------------------------------------------


def trained(callbacks: list[Any], kind: Any) -> list[np.ndarray]:
    keras.utils.set_random_seed(7)
    inputs = keras.Input((4,))
    x = L.Dropout(0.3, seed=3)(L.Dense(8)(inputs))
    x = L.ReLU()(kind(name="a")(x))
    x = kind(name="b", renorm=True, renorm_clipping={"rmax": 1.01})(L.Dense(6)(x))
    model = keras.Model(inputs, L.Dense(4)(x))
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    data = (X, RNG_TARGETS)
    model.fit(*data, epochs=2, batch_size=16, validation_data=data, callbacks=callbacks, verbose=0)
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


RNG_TARGETS = np.random.default_rng(1).normal(size=(64, 4)).astype("float32")


@pytest.mark.parametrize("kind", [L.BatchNormalization, tn.BatchNormalization])
def test_the_training_is_the_same_to_the_bit(kind: Any) -> None:
    without = trained([], kind)
    data = (X, RNG_TARGETS)
    for options in ({}, {"every": 2, "validation": data}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # statistics of 8 steps are not right yet
            watched = trained([tn.callbacks.Monitor(**options)], kind)
        assert len(without) == len(watched)
        for one, other in zip(without, watched, strict=True):
            np.testing.assert_array_equal(one, other)


# --- logs and the record -----------------------------------------------------------------------

KEYS = ["bn_beta", "bn_dead", "bn_distance", "bn_findings", "bn_gamma", "bn_noise"]


def test_logs_have_a_few_numbers_that_other_callbacks_write(tmp_path: Path) -> None:
    model, monitor = network(), tn.callbacks.Monitor()
    logger = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    history = model.fit(
        X, np.zeros((64, 4)), epochs=2, batch_size=BATCH, callbacks=[monitor, logger], verbose=0
    ).history
    assert [key for key in sorted(history) if key.startswith("bn_")] == KEYS
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert monitor.history is not None
    for key in set(KEYS) - {"bn_findings"}:
        value = monitor.history.overall(1)[key.removeprefix("bn_")]
        assert float(rows[1][key]) == pytest.approx(history[key][1])
        assert history[key][1] == pytest.approx(value)


def test_the_logs_are_over_all_layers() -> None:
    model = nested()
    model.compile("sgd", "mse")
    monitor = tn.callbacks.Monitor()
    x = RNG.normal(size=(16, 6, 6, 3)).astype("float32")
    logs = model.fit(x, np.zeros((16, 2)), batch_size=4, callbacks=[monitor], verbose=0).history
    seen = monitor.history
    assert seen is not None
    assert len(seen.layers) == 5
    for name in QUANTITIES:
        assert seen.values[name].shape == (1, 5)
    channels = np.array(seen.channels)
    values = {name: rows[0] for name, rows in seen.values.items()}
    assert logs["bn_distance"] == [pytest.approx(values["distance"].max())]
    assert logs["bn_noise"] == [pytest.approx(values["noise"].max())]
    gamma = np.sqrt((values["gamma"] ** 2 * channels).sum() / channels.sum())
    assert logs["bn_gamma"] == [pytest.approx(gamma)]
    assert logs["bn_dead"] == [pytest.approx((values["dead"] * channels).sum() / channels.sum())]


def test_the_record_prints_and_is_json() -> None:
    seen = watch(network(), epochs=2)
    facts = json.loads(seen.to_json())
    assert facts["values"]["clipped"] == [[None], [None]]
    assert np.shape(facts["values"]["distance"]) == (2, 1)
    assert facts["modes"] == [["batch + updates + learns"]] * 2
    said = str(seen)
    assert "in epoch 2, after 8 steps (look 2)" in said
    assert "batch + updates + learns" in said


# --- what it warns of --------------------------------------------------------------------------


def caught(model: Any, x: Any = X, y: Any = None, **options: Any) -> tuple[list[str], Any]:
    monitor = tn.callbacks.Monitor(**options)
    y = np.zeros((len(x), 4), "float32") if y is None else y
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.fit(x, y, epochs=3, batch_size=BATCH, callbacks=[monitor], verbose=0)
    said = [str(one.message) for one in found if one.category is UserWarning]
    return [text for text in said if text.startswith("TN")], monitor.history


def test_numbers_that_are_none_are_told_once_with_the_remedy() -> None:
    x = X.copy()
    x[:, 1] = np.nan
    said, seen = caught(network(), x)
    (first,) = [text for text in said if text.startswith("TN105")]
    assert first.startswith(
        "TN105 after epoch 1: moving statistics are no valid numbers (at 'bn'). Remedy: "
    )
    (noticed,) = [one for one in seen.findings if one.finding.code == "TN105"]
    assert noticed.epochs == (0, 1, 2)
    assert "1–3" in str(seen)


def test_a_constant_channel_is_told() -> None:
    x = X.copy()
    x[:, 1] = 7.0
    said, seen = caught(network(L.BatchNormalization(name="bn")), x)  # long before it has moved
    assert [text[:5] for text in said] == ["TN202"]
    assert "leave out the channels that never vary" in said[0]
    assert [one.finding.site for one in seen.findings if one.finding.code == "TN202"] == ["bn"]


def test_what_is_frozen_is_seen_by_what_it_does_and_is_no_warning() -> None:
    model = network(tn.BatchNormalization(name="bn"))
    tn.freeze(model, "statistics")
    said, seen = caught(model)
    assert said == []
    assert seen.modes == (("moving + learns",),) * 3
    assert [one.finding.code for one in seen.findings] == ["TN408"]
    model = network()
    model.get_layer("bn").trainable = False
    model.compile("sgd", "mse")
    said, seen = caught(model)
    assert said == []
    assert seen.modes[0] == ("moving",)
    assert [one.finding.code for one in seen.findings] == ["TN404"]


def test_training_that_a_model_does_not_pass_on_is_told() -> None:
    class Forgets(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="forgets")
            self.bn, self.head = L.BatchNormalization(name="bn"), L.Dense(4)

        def call(self, x: Any) -> Any:
            return self.head(self.bn(x))

    model = Forgets()
    model(X[:2])
    model.compile("sgd", "mse")
    said, seen = caught(model)
    assert any(text.startswith("TN101 after epoch 1") for text in said)
    assert seen.modes[0] == ("unknown + learns",)
    said, seen = caught(model, validation=(X, np.zeros((64, 4), "float32")))
    assert any(text.startswith("TN401 after epoch 1") for text in said)


def test_with_data_the_other_rules_are_checked_too() -> None:
    y = np.zeros((64, 4), "float32")
    model = network(L.BatchNormalization(name="bn", momentum=0.999))
    said, _ = caught(model, validation=(X, y))
    assert any(text.startswith("TN102 after epoch 1") for text in said)
    said, seen = caught(network(L.BatchNormalization(name="bn", momentum=0.999)))
    assert not any(text.startswith("TN102") for text in said)
    assert not any(one.finding.code == "TN102" for one in seen.findings)


# --- bad use -----------------------------------------------------------------------------------


def test_a_model_without_batch_normalization_is_refused() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(4)], name="plain")
    model.compile("sgd", "mse")
    with pytest.raises(tn.ModelError) as told:
        watch(model)
    assert str(told.value) == (
        "This model has no BatchNormalization (at 'plain'). Expected: at least one "
        "BatchNormalization layer. Received: 1 layer, none of that kind."
    )


def test_bad_options_are_refused() -> None:
    with pytest.raises(tn.OptionError, match=r"^every must be a positive integer. Received: 0\.$"):
        tn.callbacks.Monitor(every=0)
    with pytest.raises(tn.DataError, match=r"^The data of the monitor is read in every epoch"):
        watch(network(), validation=iter([X]))


def test_a_subclassed_model_is_watched() -> None:
    model = subclassed()
    model.compile("sgd", "mse")
    monitor = tn.callbacks.Monitor()
    x = RNG.normal(size=(16, 3)).astype("float32")
    model.fit(x, x, batch_size=8, callbacks=[monitor], verbose=0)
    assert monitor.history is not None
    assert monitor.history.modes == (("batch + updates + learns",),)
