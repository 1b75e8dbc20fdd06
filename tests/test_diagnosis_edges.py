"""diagnose where models, data and losses are not the usual ones."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from models import dense, shake

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
