"""collect: how exact, how much, how often; what it leaves alone; what it keeps in a file."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import Case
from small_models import dense, shake, snapshot

import truenorm as tn
from truenorm._model.values import numbers

EXACT = (
    Case((37, 5)),
    Case((600, 7), mean=1000, deviation=0.05),
    Case((12, 5, 9), 1, mean=-3e4, deviation=1),
    Case((6, 23, 19, 3)),
    Case((6, 3, 23, 19), 1, mean=100, deviation=0.01),
    Case((12, 7, 5), masked=True, mean=1000, deviation=0.05),
    Case((12, 4, 5, 6), 1, masked=True),
    Case((8, 6), dtype="float16"),
)


class Given(keras.layers.Layer):
    """Hands its input on with the mask that came as a second input."""

    def call(self, inputs: Any) -> Any:
        return inputs[0]

    def compute_mask(self, inputs: Any, previous: Any = None) -> Any:  # noqa: ARG002
        return inputs[1]


def one_layer(case: Case) -> Any:
    """The layer alone, so that what it gets is known to the last bit."""
    layer = keras.layers.BatchNormalization(case.axis, name="bn", dtype="float32")
    inputs = keras.Input(case.shape[1:], dtype=case.dtype)
    if not case.masked:
        return keras.Model(inputs, layer(inputs))
    rows = [n for axis, n in enumerate(case.shape) if axis not in (0, case.axis % len(case.shape))]
    mask = keras.Input(tuple(rows), dtype="bool")
    values = Given()([inputs, mask])
    # As a call with a mask of its own: Keras would ask for the whole shape of the input.
    return keras.Model([inputs, mask], layer(values, mask=mask))


def in_one_shot(case: Case) -> tuple[np.ndarray, np.ndarray, int]:
    drawn = case.draw()
    rows = np.moveaxis(drawn.x, case.axis, -1)
    rows = rows[drawn.mask] if case.masked else rows.reshape(-1, case.channels)
    return rows.mean(0), rows.var(0), len(rows)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_moments_are_those_of_float64_in_one_shot(case: Case) -> None:
    drawn = case.draw()
    data: Any = drawn.x.astype(case.dtype)
    data = [data, drawn.mask] if case.masked else data
    size = 5 if len(case.shape) > 2 else case.shape[0]  # 5: a last batch of 1 or 2
    population = tn.collect(one_layer(case), data, batch_size=size)
    mean, variance, count = in_one_shot(case)
    moments = population.sites["bn"]
    assert moments.count.tolist() == [count] * case.channels
    # Up to 2048 values per channel and batch it is float64 throughout. (6, 23, 19, 3) has 2185.
    wide = size * np.prod(case.shape[1:]) / case.channels <= 2048
    wide = wide or keras.config.backend() == "jax"
    shift = (moments.mean - mean) / np.sqrt(variance)
    np.testing.assert_allclose(shift, 0, atol=1e-10 if wide else 1e-8)
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-10 if wide else 2e-7)


def test_a_channel_of_one_value_and_data_that_is_not_finite() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")])
    x = np.array([[7.0, np.nan, 1.0], [7.0, 2.0, np.inf], [7.0, 2.0, 3.0]], "float32")
    moments = tn.collect(model, x, batch_size=2).sites["bn"]
    assert (moments.mean[0], moments.variance[0]) == (7.0, 0.0)
    assert not np.isfinite(moments.mean[1:]).any()


# --- what is left alone --------------------------------------------------------------------------


class Counting(keras.layers.Layer):
    """State that moves in inference mode too: a counter, and a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.calls.assign(self.calls + 1.0)
        return x + self.calls * keras.random.normal(keras.ops.shape(x), seed=self.seeds)


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, RuntimeError])
def test_nothing_of_the_model_changes(stop: type[BaseException] | None) -> None:
    layer = keras.layers.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((2,)), Counting(), keras.layers.Dropout(0.5), layer])
    model.compile("sgd", "mse", metrics=["mae"])
    before = snapshot(model)
    metrics = [numbers(v) for v in model.metrics_variables]

    def batches() -> Iterator[np.ndarray]:
        for _ in range(4):
            yield np.zeros((64, 2), "float32")
        if stop is not None:
            raise stop

    if stop is None:
        variance = tn.collect(model, batches()).sites["bn"].variance
        # The counter went from batch to batch: noise of 1, 2, 3 and 4 standard deviations.
        np.testing.assert_allclose(variance, np.mean([1, 4, 9, 16]), rtol=0.4)
    else:
        with pytest.raises(stop):
            tn.collect(model, batches())
    assert snapshot(model) == before
    assert all(map(np.array_equal, metrics, map(numbers, model.metrics_variables)))


# --- the population upstream ---------------------------------------------------------------------


def deep(layers: int) -> Any:
    chain: list[Any] = [keras.Input((8,))]
    for index in range(layers):
        chain += [
            keras.layers.Dense(8, activation="tanh", kernel_initializer="orthogonal"),
            keras.layers.BatchNormalization(name=f"bn{index}"),
        ]
    return shake(keras.Sequential(chain), spread=0.3)


def test_the_population_settles_in_far_fewer_passes_than_layers() -> None:
    model = deep(20)
    x = np.random.default_rng(0).normal(size=(600, 8)).astype("float32")
    x = x[np.argsort(x[:, 0])]  # batches that differ, as when files are in the order of classes
    done = tn.recalibrate(model, x, upstream="population", batch_size=200)
    assert done.population.passes <= 11
    seen = tn.collect(model, x, upstream="moving", batch_size=200)
    for path, moments in seen.sites.items():
        held = done.population.sites[path]
        shift = (moments.mean - held.mean) / held.standard_deviation
        np.testing.assert_allclose(shift, 0, atol=1e-5)
        np.testing.assert_allclose(moments.variance, held.variance, rtol=1e-5)


def test_data_that_is_random_anew_in_each_pass_is_settled_as_well_as_it_can_be() -> None:
    class Augmented:
        random = np.random.default_rng(0)

        def __iter__(self) -> Iterator[np.ndarray]:
            for _ in range(20):
                yield self.random.normal(size=(50, 8)).astype("float32")

    population = tn.collect(deep(6), Augmented(), upstream="population")
    assert population.passes <= 4
    assert population.agreement is not None
    assert 1e-3 < population.agreement < 1


def test_an_iterator_cannot_be_read_again() -> None:
    batches = iter([np.ones((4, 5), "float32")])
    with pytest.raises(tn.DataError) as caught:
        tn.collect(dense(), batches, upstream="population")
    assert str(caught.value) == (
        "With upstream='population' the data is read several times (at 'data'). Expected: arrays, "
        "or an iterable that begins anew each time. Received: an iterator (list_iterator), which "
        "is empty after its first pass. Remedy: give what the iterator was made of, or a list of "
        "its batches."
    )


# --- how much of the data ------------------------------------------------------------------------


def endless(size: int = 10) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    while True:
        yield random.normal(size=(size, 5)).astype("float32")


@pytest.mark.parametrize(
    ("limits", "samples", "batches"),
    [
        ({"max_batches": 3}, 30, 3),
        ({"max_samples": 24}, 24, 3),
        ({"max_samples": 30}, 30, 3),
        ({"max_samples": 7}, 7, 1),
        ({"max_batches": 2, "max_samples": 100}, 20, 2),
    ],
)
def test_endless_data_has_a_limit(limits: dict[str, int], samples: int, batches: int) -> None:
    taken = []
    data = (taken.append(1) or batch for batch in endless())
    population = tn.collect(dense(), data, **limits)
    assert (population.samples, population.batches) == (samples, batches)
    assert len(taken) == batches  # and no batch is taken from the user for nothing


def test_data_known_to_be_endless_wants_a_limit() -> None:
    class Endless(keras.utils.PyDataset):
        num_batches = None

        def __getitem__(self, index: int) -> Any:
            return np.ones((4, 5), "float32")

    with pytest.raises(tn.DataError, match=r"^This data has no end \(at 'data'\)\. Remedy:"):
        tn.collect(dense(), Endless())
    with pytest.raises(tn.OptionError, match="max_batches must be a positive integer"):
        tn.collect(dense(), Endless(), max_batches=0)


def test_converged_is_when_the_standard_error_is_a_fiftieth() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization(name="bn")])
    population = tn.collect(model, endless(25), until="converged")
    assert 0.015 < population.standard_errors()["bn"] <= 0.02
    # Independent numbers: the mean of 2500 of them is uncertain by a fiftieth.
    assert 1800 < population.samples < 3500
    model.get_layer("bn").moving_mean.assign([9.0] * 5)
    settled = tn.collect(
        model, list(itertools.islice(endless(25), 200)), until="converged", upstream="population"
    )
    assert settled.samples == population.samples  # each pass reads as much


def test_progress_is_told_on_the_standard_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    tn.collect(dense(), np.ones((8, 5), "float32"), batch_size=4, progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert "pass 1: 4 samples, standard error" in said.err  # the next comes too soon to be shown


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def population() -> tn.Population:
    x = np.random.default_rng(0).normal(size=(50, 8)).astype("float32")
    return tn.collect(deep(2), x, upstream="population", batch_size=20)


def test_a_population_is_saved_bit_for_bit(population: tn.Population, tmp_path: Path) -> None:
    path = tmp_path / "population.npz"
    population.save(path)
    loaded = tn.Population.load(path)
    assert loaded.to_dict() == population.to_dict()
    assert str(loaded) == str(population)
    model = deep(2)
    done = tn.recalibrate(model, loaded)
    assert done.population is loaded
    held = keras.ops.convert_to_numpy(model.get_layer("bn1").moving_mean)
    np.testing.assert_array_equal(held, population.sites["bn1"].mean.astype("float32"))
    assert max(gap.mean for gap in done.after) < 1e-6 < min(gap.mean for gap in done.before)


def without_values(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        kept = old.read("description.npy")
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("description.npy", kept)


def with_values(values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        description = np.load(path)["description"]
        np.savez(path, description=description, values=values)

    return change


def huge(path: Path) -> None:
    """A header that promises 80 GB."""
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["values.npy"] = parts["values.npy"].replace(b"(10, 16), ", b"(10, 10**9)")
    parts["values.npy"] = parts["values.npy"].replace(b"(10, 10**9)", b"(10,999999999), "[:11])
    with zipfile.ZipFile(path, "w") as new:
        for name, part in parts.items():
            new.writestr(name, part)


BAD: dict[str, Callable[[Path], Any]] = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-40]),
    "flipped": lambda p: p.write_bytes(p.read_bytes().replace(b"samples", b"sAmples")),
    "text": lambda p: p.write_text("no"),
    "without values": without_values,
    "objects": with_values(np.array([[{}]], object)),
    "another shape": with_values(np.zeros((10, 15))),
    "integers": with_values(np.zeros((10, 16), int)),
    "negative counts": with_values(-np.ones((10, 16))),
    "counts that are not numbers": with_values(np.full((10, 16), np.nan)),
    "huge": huge,
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_refused(fault: str, population: tn.Population, tmp_path: Path) -> None:
    path = tmp_path / "population.npz"
    population.save(path)
    BAD[fault](path)
    with pytest.raises(tn.DataError, match=r"^This file does not hold a population"):
        tn.Population.load(path)


def test_a_file_that_is_not_there_and_a_folder_that_is_not(
    population: tn.Population, tmp_path: Path
) -> None:
    with pytest.raises(tn.DataError, match=r"^There is no such file"):
        tn.Population.load(tmp_path / "none.npz")
    with pytest.raises(tn.OutputError):
        population.save(tmp_path / "no folder" / "population.npz")


def test_a_population_of_another_model_is_refused(population: tn.Population) -> None:
    model = dense()
    before = snapshot(model)
    with pytest.raises(tn.DataError) as caught:
        tn.recalibrate(model, population)
    assert str(caught.value) == (
        "This population is of another model (at 'bn0'). Expected: one of ['bn']. "
        "Received: 8 channels."
    )
    assert snapshot(model) == before
