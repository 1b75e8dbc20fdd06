"""Several batches that move the statistics as one: the union's moments, by the reference."""

from __future__ import annotations

import pathlib
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, tensor

import truenorm as tn
from truenorm import BatchNormalization, OptionError
from truenorm._kernels import reference

RNG = np.random.default_rng(8)
MOMENTUM = 0.7
EPSILON = 1e-3
BATCHES = [RNG.normal(2 * i, 1 + i, (n, 3)) for i, n in enumerate((8, 3, 5, 8, 8, 2))]


def union(batches: list[np.ndarray], masks: Any = None) -> reference.Forward:
    mask = None if masks is None else np.concatenate(masks)
    return reference.forward(np.concatenate(batches), epsilon=EPSILON, mask=mask)


def moved(*unions: reference.Forward, bessel: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Moving mean and variance of a new layer after these batches."""
    mean, variance = np.zeros(3), np.ones(3)
    for batch in unions:
        value = batch.variance * (batch.count / (batch.count - 1) if bessel else 1)
        mean = reference.moving(mean, batch.mean, MOMENTUM)
        variance = reference.moving(variance, value, MOMENTUM)
    return mean, variance


def train(layer: Any, batches: list[np.ndarray], masks: Any = None) -> None:
    for i, batch in enumerate(batches):
        mask = None if masks is None else tensor(masks[i], "bool")
        layer(tensor(batch), training=True, mask=mask)


def assert_moved(layer: Any, expected: tuple[np.ndarray, np.ndarray], rtol: float = 2e-6) -> None:
    for variable, true in zip((layer.moving_mean, layer.moving_variance), expected, strict=True):
        np.testing.assert_allclose(array(variable), true, rtol=rtol, atol=1e-7)


def test_three_batches_of_unlike_size_are_one() -> None:
    layer = BatchNormalization(momentum=MOMENTUM, accumulation_steps=3)
    train(layer, BATCHES[:2])
    assert_moved(layer, (np.zeros(3), np.ones(3)))
    train(layer, BATCHES[2:3])
    assert_moved(layer, moved(union(BATCHES[:3])))
    assert not array(layer.gathered).any()
    train(layer, BATCHES[3:])
    assert_moved(layer, moved(union(BATCHES[:3]), union(BATCHES[3:])))


def test_each_batch_is_still_normalised_with_its_own_moments() -> None:
    layer = BatchNormalization(accumulation_steps=3)
    for batch in BATCHES[:3]:
        found = array(layer(tensor(batch), training=True))
        np.testing.assert_allclose(found, reference.forward(batch).output, atol=1e-5)


def test_masks_of_unlike_counts() -> None:
    masks = [
        RNG.random(len(batch)) < share
        for batch, share in zip(BATCHES, (1, 0.4, 0.7, 0), strict=False)
    ]
    layer = BatchNormalization(momentum=MOMENTUM, accumulation_steps=4)
    train(layer, BATCHES[:4], masks)
    assert_moved(layer, moved(union(BATCHES[:4], masks)))


def test_a_mask_of_single_channels() -> None:
    batches = [RNG.normal(i, 1, (4, 3, 5)) for i in range(2)]
    masks = [RNG.random((4, 3)) < 0.6 for _ in range(2)]
    layer = BatchNormalization(axis=1, momentum=MOMENTUM, accumulation_steps=2)
    train(layer, batches, masks)
    whole = reference.forward(np.concatenate(batches), axis=1, mask=np.concatenate(masks))
    assert_moved(layer, moved(whole))


def test_bessels_correction_is_that_of_the_union() -> None:
    layer = BatchNormalization(momentum=MOMENTUM, accumulation_steps=3, bessel_correction=True)
    train(layer, BATCHES[:3])
    assert_moved(layer, moved(union(BATCHES[:3]), bessel=True))


def test_single_values_have_a_variance_together() -> None:
    layer = BatchNormalization(momentum=MOMENTUM, accumulation_steps=4)
    train(layer, [BATCHES[0][i : i + 1] for i in range(4)])
    assert_moved(layer, moved(union([BATCHES[0][:4]])))


def test_the_mean_over_all_batches_counts_unions() -> None:
    layer = BatchNormalization(momentum=None, accumulation_steps=3)
    train(layer, BATCHES)
    unions = [np.concatenate(part) for part in (BATCHES[:3], BATCHES[3:])]
    expected = (
        np.mean([u.mean(0) for u in unions], 0),
        np.mean([u.var(0, ddof=1) for u in unions], 0),
    )
    assert_moved(layer, expected)
    assert (array(layer.batches_seen) == 2).all()


def test_ghost_batches_stay_ghost_batches() -> None:
    batches = [RNG.normal(3 * i, 1, (8, 3)) for i in range(2)]
    layer = BatchNormalization(momentum=MOMENTUM, accumulation_steps=2, virtual_batch_size=4)
    train(layer, batches)
    ghosts = [batch[i::2] for batch in batches for i in range(2)]
    mean = np.mean([ghost.mean(0) for ghost in ghosts], 0)
    variance = np.mean([ghost.var(0) for ghost in ghosts], 0)
    assert_moved(
        layer,
        (reference.moving(0.0, mean, MOMENTUM), reference.moving(1.0, variance, MOMENTUM)),
    )


def test_renorm_moves_all_its_statistics_by_the_union() -> None:
    layer = BatchNormalization(
        momentum=MOMENTUM, renorm=True, renorm_momentum=0.4, accumulation_steps=3
    )
    train(layer, BATCHES[:2])
    assert (array(layer.renorm_mean) == 0).all()
    train(layer, BATCHES[2:3])
    whole = union(BATCHES[:3])
    deviation = np.sqrt(whole.variance + EPSILON)
    expected = {
        "moving_mean": reference.moving(0.0, whole.mean, MOMENTUM),
        "renorm_mean": reference.moving(0.0, whole.mean, 0.4),
        "renorm_stddev": reference.moving(1.0, deviation, 0.4),
        "moving_stddev": reference.moving(1.0, deviation, MOMENTUM),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(array(getattr(layer, name)), value, rtol=2e-6)


def test_poison_stays_in_its_channel_and_its_batch() -> None:
    poisoned = [batch.copy() for batch in BATCHES[:3]]
    poisoned[1][0, 2] = np.inf
    layer = BatchNormalization(momentum=MOMENTUM, accumulation_steps=3)
    train(layer, poisoned)
    mean, variance = moved(union(BATCHES[:3]))
    without = moved(union([BATCHES[0], BATCHES[2]]))
    mean[2], variance[2] = without[0][2], without[1][2]
    assert_moved(layer, (mean, variance))


def test_a_mean_that_is_large_costs_few_digits_of_the_variance() -> None:
    """Of the part between the batches: their means are of seven digits."""
    batches = [RNG.normal(1000, 0.05, (64, 3)).astype("float32") for _ in range(4)]
    layer = BatchNormalization(momentum=0.0, accumulation_steps=4)
    train(layer, batches)
    whole = union([batch.astype("float64") for batch in batches])
    assert_moved(layer, (whole.mean, whole.variance), rtol=5e-4)


@pytest.mark.parametrize("domains", [None, 2])
def test_an_accumulation_that_has_begun_goes_on_or_is_ended(
    tmp_path: pathlib.Path, domains: int | None
) -> None:
    model = keras.Sequential(
        [
            keras.Input((3,)),
            BatchNormalization(momentum=MOMENTUM, accumulation_steps=3, domains=domains),
        ]
    )

    def statistics(model: Any) -> list[np.ndarray]:
        layer = model.layers[0]
        rows = slice(None) if domains is None else 0
        return [array(v)[rows] for v in (layer.moving_mean, layer.moving_variance)]

    train(model, BATCHES[:2])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].accumulation_steps == 3
    train(loaded, BATCHES[2:3])
    np.testing.assert_allclose(statistics(loaded), moved(union(BATCHES[:3])), rtol=2e-6)
    model.layers[0].end_accumulation()
    np.testing.assert_allclose(statistics(model), moved(union(BATCHES[:2])), rtol=2e-6)
    model.layers[0].end_accumulation()  # Nothing has begun.
    np.testing.assert_allclose(statistics(model), moved(union(BATCHES[:2])), rtol=2e-6)
    train(model, BATCHES[3:])
    expected = moved(union(BATCHES[:2]), union(BATCHES[3:]))
    np.testing.assert_allclose(statistics(model), expected, rtol=2e-6)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_in_fit_it_is_in_step_with_the_optimizer(run_eagerly: bool) -> None:
    """Five batches an epoch, four to a step: the sixth step of two epochs ends in the second."""
    x = np.concatenate([RNG.normal(i, 1 + i, (4, 3)) for i in range(5)]).astype("float32")
    model = keras.Sequential(
        [keras.Input((3,)), BatchNormalization(momentum=MOMENTUM, accumulation_steps=4)]
    )
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    model.compile(optimizer, "mse", run_eagerly=run_eagerly)
    model.fit(x, x, batch_size=4, epochs=2, shuffle=False, verbose=0)
    batches = [x[i : i + 4].astype("float64") for i in (*range(0, 20, 4), *range(0, 12, 4))]
    assert_moved(model.layers[0], moved(union(batches[:4]), union(batches[4:])))
    assert array(model.layers[0].gathered)[0].tolist() == [2, 2, 2]


def test_replace_and_a_monitor_know_it() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4), "mse")
    (finding,) = tn.diagnose(model, select="TN308").findings
    names = {"tn": tn, "model": model}
    exec(finding.remedy, names)  # noqa: S102
    changed: Any = names["model"]
    assert changed.layers[0].accumulation_steps == 4
    assert not tn.diagnose(changed, select="TN308").findings
    x = np.concatenate(BATCHES).astype("float32")
    monitor = tn.callbacks.Monitor(every=1)
    changed.fit(x, x, batch_size=8, epochs=2, verbose=0, callbacks=[monitor])
    # What one batch made of the averages cannot be told from averages that wait for others.
    assert np.isnan(monitor.history.values["distance"]).all()


def test_frozen_and_in_inference_nothing_is_gathered() -> None:
    layer = BatchNormalization(accumulation_steps=2, freeze="statistics")
    train(layer, BATCHES[:1])
    layer(tensor(BATCHES[0]), training=False)
    assert not array(layer.gathered).any()
    layer.end_accumulation()
    assert_moved(layer, (np.zeros(3), np.ones(3)))


def test_impossible_numbers() -> None:
    with pytest.raises(OptionError) as caught:
        BatchNormalization(accumulation_steps=0)
    assert str(caught.value) == "accumulation_steps must be a positive integer. Received: 0."
