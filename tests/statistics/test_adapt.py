"""adapt: the target domain's statistics, nothing else changed, and the way back."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from small_models import dense, inputs_for, nested, predict, shake, snapshot

import truenorm as tn


def numbers(variable: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable), "float64")


def statistics(model: Any) -> dict[str, bytes]:
    return {v.path: numbers(v).tobytes() for v in model.non_trainable_variables}


def test_a_shift_of_the_whole_domain_is_taken_out_again() -> None:
    """Where brightness and contrast change, the outputs come back to those on the source."""
    layer = keras.layers.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(2)])
    source = inputs_for(model, 64)
    tn.recalibrate(model, source)
    (expected,) = predict(model, source)
    target = 100 * source + 40
    assert np.abs(predict(model, target)[0] - expected).max() > 10
    adapted = tn.adapt(model, target)
    np.testing.assert_allclose(predict(model, target)[0], expected, atol=2e-3)  # epsilon's share
    assert adapted.before[0].mean > 0.3


@pytest.mark.parametrize("prior", [0, 8, 32])
def test_the_statistics_are_those_of_the_old_and_the_target_samples_together(prior: int) -> None:
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.BatchNormalization(name="bn")])
    layer = model.get_layer("bn")
    layer.moving_mean.assign([1.0, -2.0])
    layer.moving_variance.assign([4.0, 9.0])
    target = inputs_for(model, 24).astype("float64")
    tn.adapt(model, target.astype("float32"), prior=prior, batch_size=5)
    # Two values that have the old mean and variance, for each value of `prior` samples.
    old = np.array([[1.0, -2.0]]) + np.array([[-1.0], [1.0]]) * np.array([[2.0, 3.0]])
    together = np.concatenate([target.reshape(-1, 2), np.tile(old, (prior * 3 // 2, 1))])
    np.testing.assert_allclose(numbers(layer.moving_mean), together.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(numbers(layer.moving_variance), together.var(axis=0), rtol=1e-6)


def test_nothing_else_changes_and_it_is_undone() -> None:
    model = shake(nested())
    model.compile("sgd", "mse")
    before, old = snapshot(model), statistics(model)
    kept = [numbers(v).tobytes() for v in model.trainable_variables]
    adapted = tn.adapt(model, inputs_for(model, 16), prior=3)
    assert [numbers(v).tobytes() for v in model.trainable_variables] == kept
    assert all(statistics(model)[path] != value for path, value in old.items() if "moving" in path)
    adapted.undo()
    assert snapshot(model) == before


@pytest.mark.parametrize("prior", [-1, float("nan"), float("inf"), "5"])
def test_a_prior_that_is_no_number_of_samples_is_refused(prior: Any) -> None:
    model = dense()
    with pytest.raises(tn.OptionError, match=r"^The weight of the old statistics is not a number"):
        tn.adapt(model, inputs_for(model), prior=prior)
