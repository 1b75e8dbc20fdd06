"""Training on the two devices of ``tf.distribute.MirroredStrategy``, by the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from truenorm._kernels import reference

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        keras.config.backend() != "tensorflow", reason="strategies are TensorFlow's"
    ),
]
PROGRAM = Path(__file__).parents[1] / "mirrored_training.py"
EPSILON = 1e-3
MOMENTUM = 0.5
NEAR = 2e-6
Statistics = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each situation has found."""
    out = tmp_path_factory.mktemp("mirrored")
    program = [sys.executable, "-W", "ignore", str(PROGRAM), str(out)]
    ended = subprocess.run(program, capture_output=True, text=True, env=os.environ, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return out


def read(folder: Path, situation: str) -> Any:
    return json.loads((folder / f"{situation}.json").read_text("utf-8"))


def batch(seed: int = 0) -> np.ndarray:
    """As in the program, in float64."""
    parts = [np.random.default_rng([seed, i]).normal(10 * i, 1 + i, (8, 3)) for i in range(2)]
    return np.concatenate(parts).astype("float32").astype("float64")


def halves(*seeds: int) -> list[np.ndarray]:
    """What each device saw of these batches."""
    return [np.concatenate([np.split(batch(seed), 2)[i] for seed in seeds]) for i in range(2)]


def moved(*batches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving mean and variance of a new layer after these batches."""
    mean, variance = np.zeros(3), np.ones(3)
    for each in batches:
        moments = reference.forward(each, epsilon=EPSILON)
        mean = reference.moving(mean, moments.mean, MOMENTUM)
        variance = reference.moving(variance, moments.variance, MOMENTUM)
    return mean, variance


def assert_near(found: Any, true: Any, rtol: float = NEAR) -> None:
    np.testing.assert_allclose(found, true, rtol=rtol, atol=1e-6)


def assert_moved(found: Statistics, devices: list[tuple[Any, Any]]) -> None:
    """Those of each device."""
    assert len(found["moving_mean"]) == len(devices) == 2
    for i, (mean, variance) in enumerate(devices):
        assert_near(found["moving_mean"][i], mean)
        assert_near(found["moving_variance"][i], variance)


def normalised(x: np.ndarray, statistics: tuple[Any, Any]) -> np.ndarray:
    mean, variance = statistics
    return (x - mean) / np.sqrt(variance + EPSILON)


# --- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", ["keras_drifts", "ours_drifts", "synchronized_does_not"])
def test_what_drifts_and_who_reads_which(situation: str, folder: Path) -> None:
    """The model's weights, its file and a bare call have the first device's statistics."""
    found = read(folder, situation)
    parts = halves(0) if situation != "synchronized_does_not" else [batch(), batch()]
    devices = [moved(part) for part in parts]
    assert_moved(found["devices"], devices)
    assert found["get_weights"] == found["file"] == found["devices"]["moving_mean"][0]
    first, second = (normalised(np.zeros((8, 3)), each) for each in devices)
    assert_near(found["call"], [*first, *first])
    assert_near(found["predict"], [*first, *second])


def total(statistics: Statistics, weights: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The law of total variance, by hand."""
    means, variances = np.array(statistics["moving_mean"]), np.array(statistics["moving_variance"])
    shares = np.array(weights)[:, None] / sum(weights)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0)


@pytest.mark.parametrize("situation", ["sync_of_keras", "sync_of_ours"])
def test_statistics_of_the_devices_are_made_one(situation: str, folder: Path) -> None:
    found = read(folder, situation)
    for name, weights in (("equal", (1, 1)), ("weighted", (1, 3))):
        mean, variance = total(found["before"], weights)
        deviation = np.sqrt(variance + EPSILON)
        after = found[name]
        assert_moved(after, 2 * [(mean, variance)])
        assert_near(after["renorm_mean"], [mean, mean])
        assert_near(after["renorm_stddev"], [deviation, deviation])
        assert_near(after["moving_stddev"], [deviation, deviation])
        assert all(first == second for first, second in after.values())  # the same bits
    assert found["undone"] == found["before"]
    assert found["again"] == 0
    far = np.abs(np.array(found["before"]["moving_mean"]) - mean) / deviation
    assert_near(found["drift"], far.max(), rtol=1e-3)  # the epsilon in it
    assert found["counts"] == [1, 1]
    assert "Moving statistics of 2 replicas made one, in 1 layer\n" in found["record"]
    assert "They counted for 1, 1." in found["record"]
    assert found["refused"] == {
        "name": "OptionError",
        "message": "count has to be one number, or one for each replica in this process. "
        "Expected: 2 numbers. Received: 3.",
    }
    assert found["nothing"]["name"] == "DataError"


def test_what_is_no_number_on_one_device_does_not_count(folder: Path) -> None:
    found = read(folder, "a_poisoned_device")
    assert found["moving_mean"] == 2 * [[0.0, 2.0, 2.0]]
    assert found["moving_variance"] == 2 * [[1.0, 5.0, 5.0]]


def test_the_callback_makes_them_one_before_validation(folder: Path) -> None:
    found = read(folder, "callback")
    one = total(found["before"], (1, 1))
    assert_moved(found["after"], 2 * [one])
    loss = np.square(normalised(batch(1), one) - batch(1)).mean()
    assert_near(found["val_loss"], loss, rtol=1e-5)
    assert "They counted for 1, 1." in found["record"]


def test_tools_put_back_what_each_device_had(folder: Path) -> None:
    found = read(folder, "putting_back")
    assert found["domain undone"] == found["domain before"]
    for before, after in zip(
        found["domain before"]["moving_mean"], found["domain after"]["moving_mean"], strict=True
    ):
        assert after[0] == before[0]  # the other domain is each device's own
        assert_near(after[1], batch(1).mean(0))
    assert found["inspected"] == found["undone"] == found["before"]
    first, second = found["before"]["moving_mean"]
    assert first != second
    assert found["recalibrated"]["moving_mean"][0] == found["recalibrated"]["moving_mean"][1]
    deviation = np.sqrt(batch(1).var(0) + EPSILON)
    far = np.abs(np.array([first, second]) - batch(1).mean(0)) / deviation
    assert_near(found["gap"], far.max(), rtol=1e-4)


# --- accumulation ------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", ["gathered_alone", "gathered_together"])
def test_batches_are_gathered_on_each_device_or_on_all(situation: str, folder: Path) -> None:
    found = read(folder, situation)
    together = situation == "gathered_together"

    def seen(*seeds: int) -> list[np.ndarray]:
        everything = np.concatenate([batch(seed) for seed in seeds])
        return [everything, everything] if together else halves(*seeds)

    step, rest = seen(0, 1), seen(2)
    assert_moved(found["step"], [moved(part) for part in step])
    assert found["waiting"] == found["step"]
    assert_moved(found["ended"], [moved(*both) for both in zip(step, rest, strict=True)])
    assert not np.any(found["gathered"])


def gradients(*seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the mean squared error of a new layer over these batches, in gamma and beta."""
    of_gamma, of_beta = np.zeros(3), np.zeros(3)
    for seed in seeds:
        x = batch(seed)
        output = reference.forward(x, epsilon=EPSILON).output
        backward = reference.backward(2 * (output - x) / x.size, x, epsilon=EPSILON)
        of_gamma, of_beta = of_gamma + backward.gamma, of_beta + backward.beta
    return of_gamma / len(seeds), of_beta / len(seeds)


def test_an_optimizer_that_accumulates_is_keras_affair(folder: Path) -> None:
    """Compiled, it does the same whatever the layer; run eagerly, it is in step with ours."""
    found = read(folder, "optimizers")
    assert found["stock"]["name"] == found["ours"]["name"]
    right = [found["eager"]] if found["ours"]["name"] else [found["eager"], found["ours"]]
    for one in right:
        assert one["name"] == ""
        assert_moved(one, 2 * [moved(np.concatenate([batch(0), batch(1)]))])
        _, of_beta = gradients(0, 1)
        assert_near(one["beta"], 2 * [-0.1 * of_beta], rtol=1e-5)


def test_gradients_that_are_added_up_by_hand(folder: Path) -> None:
    found = read(folder, "by_hand")
    of_gamma, of_beta = gradients(0, 1)
    assert_near(found["gamma"], 2 * [1 - 0.1 * of_gamma], rtol=1e-5)
    assert_near(found["beta"], 2 * [-0.1 * of_beta], rtol=1e-5)
    assert_moved(found, 2 * [moved(np.concatenate([batch(0), batch(1)]))])


# --- domains -----------------------------------------------------------------------------------


def of_domain(found: Statistics, domain: int) -> Statistics:
    """The statistics of one domain on each device."""
    names = ("moving_mean", "moving_variance")
    return {name: [rows[domain] for rows in found[name]] for name in names}


@pytest.mark.parametrize("situation", ["a_domain_alone", "a_domain_together"])
def test_a_domain_for_a_call_of_fit(situation: str, folder: Path) -> None:
    found = read(folder, situation)
    together = situation == "a_domain_together"
    for domain in range(2):
        parts = [batch(domain)] * 2 if together else halves(domain)
        assert_moved(of_domain(found, domain), [moved(part) for part in parts])
    statistics = [moved(part) for part in ([batch(1)] * 2 if together else halves(1))]
    near = [normalised(x, one) for x, one in zip(halves(1), statistics, strict=True)]
    assert_near(found["predict"], np.concatenate(near), rtol=1e-5)


def test_a_strategy_that_begins_in_a_domain(folder: Path) -> None:
    found = read(folder, "a_domain_of_a_new_strategy")
    for domain in range(2):
        assert_moved(of_domain(found, domain), [moved(part) for part in halves(domain)])


def test_domains_by_sample_of_which_one_device_lacks_one(folder: Path) -> None:
    found = read(folder, "domains_by_sample")
    numbers = np.array(found["domains"])
    for domain in range(2):
        own = moved(batch()[numbers == domain])
        assert_moved(of_domain(found, domain), [own, own])
    untrained = normalised(batch(), (np.zeros(3), np.ones(3)))
    assert_near(found["loss"], np.square(untrained - batch()).mean(), rtol=1e-5)


def test_a_domain_that_a_step_enters_is_left_again_by_all_devices(folder: Path) -> None:
    """Also where the first layer of this process was made elsewhere."""
    found = read(folder, "a_domain_in_a_step")
    for domain in range(2):
        own = moved(batch() + domain)
        assert_moved(of_domain(found, domain), [own, own])
    plain, untouched = found["plain"]
    assert_near(plain, moved(batch())[0])
    assert untouched == [0.0, 0.0, 0.0]


# --- callbacks ---------------------------------------------------------------------------------


def test_a_monitor_watches_the_first_device_and_changes_nothing(folder: Path) -> None:
    found = read(folder, "a_monitor")
    assert found["same"]
    assert found["modes"] == [["batch + updates + learns"]] * 2
    history = found["history"]
    assert set(history) == {
        "bn_beta", "bn_dead", "bn_distance", "bn_findings", "bn_gamma", "bn_noise",
    }  # fmt: skip
    assert np.isfinite([*history.values()]).all()
    for name, value in found["alone"].items():
        assert_near(found["values"][name], value, rtol=1e-4)


def test_recalibration_gives_all_devices_the_population(folder: Path) -> None:
    found = read(folder, "recalibrating")
    x = np.array(found["data"])
    assert_moved(found["statistics"], 2 * [(x.mean(0), x.var(0))])
    loss = np.square(normalised(x, (x.mean(0), x.var(0))) - x).mean()
    assert_near(found["val_loss"], [loss, loss], rtol=1e-5)
