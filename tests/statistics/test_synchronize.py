"""Moving statistics of two processes become those of all their data."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import small_models as models
import two_processes
from synchronizing_process import COUNTS

import truenorm as tn

WORKER = Path(__file__).parents[1] / "synchronizing_process.py"
EPSILON = 1e-3
Found = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes have written."""
    return two_processes.run(WORKER, tmp_path_factory.mktemp("processes"))


def read(folder: Path, name: str) -> Found:
    return [dict(np.load(folder / f"{name} {rank}.npz")) for rank in range(2)]


def merged(before: Found, layer: str, weights: tuple[float, float]) -> tuple[np.ndarray, ...]:
    """The law of total variance, by hand."""
    means, variances = (
        np.stack([np.float64(one[f"{layer}/{name}"]) for one in before])
        for name in ("moving_mean", "moving_variance")
    )
    shares = np.array(weights)[:, None] / sum(weights)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0)


@pytest.mark.costly
def test_both_get_the_mean_and_variance_of_all(folder: Path) -> None:
    before, after = read(folder, "before"), read(folder, "after")
    for layer in ("bn", "renorm"):
        mean, variance = merged(before, layer, COUNTS)
        np.testing.assert_allclose(after[0][f"{layer}/moving_mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(after[0][f"{layer}/moving_variance"], variance, rtol=1e-6)
    mean, variance = merged(before, "renorm", COUNTS)
    np.testing.assert_allclose(after[0]["renorm/renorm_mean"], mean, rtol=1e-6)
    for name in ("renorm_stddev", "moving_stddev"):
        deviation = np.sqrt(variance + EPSILON)
        np.testing.assert_allclose(after[0][f"renorm/{name}"], deviation, rtol=1e-6)
    for path, value in after[0].items():
        np.testing.assert_array_equal(value, after[1][path])  # the same bits
        assert not np.array_equal(before[0][path], before[1][path])


@pytest.mark.costly
def test_each_can_have_its_own_back(folder: Path) -> None:
    for before, undone in zip(read(folder, "before"), read(folder, "undone"), strict=True):
        for path, value in before.items():
            np.testing.assert_array_equal(undone[path], value)


@pytest.mark.costly
def test_what_is_no_number_in_one_process_does_not_count(folder: Path) -> None:
    for found in read(folder, "poisoned"):
        np.testing.assert_array_equal(found["bn/moving_mean"], np.full(6, 2.0))
        own = read(folder, "before")[0]["bn/moving_variance"]
        np.testing.assert_allclose(found["bn/moving_variance"], own, rtol=1e-6)


@pytest.mark.costly
def test_the_record_says_what_counted_and_how_far_each_was(folder: Path) -> None:
    for rank in range(2):
        said = (folder / f"record {rank}.txt").read_text("utf-8")
        assert "Moving statistics of 2 processes made one, in 2 layers" in said
        assert "They counted for 3, 9." in said


@pytest.mark.costly
@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="the strategy keeps them equal")
def test_the_callback_counts_the_steps_of_fit(folder: Path) -> None:
    first, second = read(folder, "fitted")
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path])
    assert "They counted for 1, 2." in (folder / "callback 0.txt").read_text("utf-8")


@pytest.mark.costly
def test_a_process_that_fails_does_not_leave_the_other_waiting(folder: Path) -> None:
    said = [(folder / f"failure {rank}.txt").read_text("utf-8") for rank in range(2)]
    assert said[0].startswith(
        "Another process that synchronizes statistics with this one has failed."
    )
    assert said[1] == "count must be 0 or a positive integer. Received: -1."


def test_one_process_changes_nothing_and_says_so() -> None:
    model = models.shake(models.dense())
    before = models.snapshot(model)
    done = tn.sync_statistics(model)
    assert str(done) == "Nothing to synchronize: this process is alone, and its statistics stay"
    assert (done.counts, done.drift) == ((1,), ())
    done.undo()
    assert models.snapshot(model) == before


def test_a_model_without_batch_normalization_is_refused() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain")
    message = (
        "This model has no BatchNormalization (at 'plain'). Expected: at least one "
        "BatchNormalization layer. Received: 1 layer, none of that kind."
    )
    model.compile("sgd", "mse")
    x = np.zeros((4, 3))
    callback = tn.callbacks.SyncStatistics()
    for call in (
        lambda: tn.sync_statistics(model),
        lambda: model.fit(x, np.zeros((4, 2)), callbacks=[callback], verbose=0),
    ):
        with pytest.raises(tn.ModelError) as caught:
            call()
        assert str(caught.value) == message
