"""TN302: dropout before statistics that were taken with it, and that were taken without."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from diagnosed import dropped, only, set_statistics

import truenorm as tn

pytestmark = pytest.mark.any_backend

L = keras.layers


def test_dropout_before_statistics_that_were_taken_without_it_is_no_fault() -> None:
    """What the remedy mends is found no more; what training has made is."""
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(5).normal(2.0, 1.0, (512, 6, 6, 3)).astype("float32")
    y = x.mean(axis=(1, 2))[:, :1]
    model = dropped()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, y, batch_size=32, epochs=40, verbose=0)
    finding = only(tn.diagnose(model, x, select="TN302"))
    assert (finding.site, finding.remedy) == ("bn", "tn.recalibrate(model, data)")
    assert finding.evidence["output_error"] > 0.15  # by hand: 1 - 1 / sqrt(2), of mean 0
    assert only(tn.diagnose(model, select="TN302")).remedy == "tn.diagnose(model, data, y)"
    tn.recalibrate(model, x)
    assert not tn.diagnose(model, x, select="TN302").findings


def after_dropout(samples: int, rate: float, kept: float) -> tuple[Any, Any]:
    """A model and its data, of mean 0, with `kept` times the right variances; and their layer."""
    x = np.random.default_rng(7).normal(0.0, 1.0, (samples, 4)).astype("float32")
    x -= x.mean(axis=0)
    layer = L.BatchNormalization(name="bn", epsilon=1e-7)
    model = keras.Sequential([keras.Input((4,)), L.Dropout(rate), layer, L.Dense(1)])
    set_statistics(layer, np.zeros(4), kept * np.float64(x).var(axis=0))
    return model, x


@pytest.mark.parametrize(
    ("samples", "rate", "told"),
    [
        (512, 0.5, "output_error"),
        (64, 0.5, ""),  # too few: an error of 0.29 could be theirs
        (512, 0.2, ""),  # an error of 0.1056; noticeable are 0.1326
        (4096, 0.2, "output_error"),
        (512, 0.1, ""),
        (4096, 0.1, ""),  # an error of 0.05; below 0.1 nothing is told with certainty
    ],
)
def test_dropout_before_statistics_that_hold_its_variance(
    samples: int, rate: float, told: str
) -> None:
    """By hand: the variance of training is 1 / (1 - rate) times that of inference."""
    model, x = after_dropout(samples, rate, 1 / (1 - rate))
    finding = only(tn.diagnose(model, x, select="TN302"))
    assert finding.site == "bn"
    if told:
        assert finding.evidence[told] == pytest.approx(1 - np.sqrt(1 - rate), abs=1e-4)
        assert finding.remedy == "tn.recalibrate(model, data)"
    else:
        assert "output_error" not in finding.evidence
        assert finding.remedy == "tn.diagnose(model, data, y)"
    tn.recalibrate(model, x)
    assert not tn.diagnose(model, x, select="TN302").findings


def test_dropout_before_frozen_statistics_that_hold_its_variance() -> None:
    model, x = after_dropout(512, 0.5, 2.0)
    model.get_layer("bn").trainable = False
    finding = only(tn.diagnose(model, x, select="TN302"))
    assert finding.evidence["output_error"] == pytest.approx(1 - np.sqrt(0.5), abs=1e-4)
    assert finding.remedy == (
        "tn.recalibrate(model, data); and its undo(), if the model does worse"
    )
    tn.recalibrate(model, x)
    assert not tn.diagnose(model, x, select="TN302").findings


def test_dropout_before_statistics_that_never_moved() -> None:
    model, x = after_dropout(512, 0.5, 1.0)
    set_statistics(model.get_layer("bn"), np.zeros(4), np.ones(4))
    assert only(tn.diagnose(model, x, select="TN302")).remedy == "tn.diagnose(model, data, y)"
