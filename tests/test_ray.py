"""Shards collected by Ray's tasks and merged are one pass (docs/statistics.md)."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from models import dense, shake

import truenorm as tn

ray = pytest.importorskip("ray", reason="ray is an extra of its own: pip install 'truenorm[ray]'")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_shards_on_ray_merge_to_one_pass(tmp_path: Path) -> None:
    model = shake(dense())
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    environment = {"env_vars": {"KERAS_BACKEND": os.environ["KERAS_BACKEND"]}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:

        @ray.remote(runtime_env=environment)
        def shard(path: str, part: np.ndarray) -> tn.Population:
            import truenorm

            return truenorm.collect(keras.saving.load_model(path), part, batch_size=8)

        path = str(tmp_path / "model.keras")
        parts = ray.get([shard.remote(path, part) for part in np.split(x, 2)])
    finally:
        ray.shutdown()
    merged = functools.reduce(tn.Population.merge, parts)
    alone = tn.collect(model, x, batch_size=8).sites["bn"]
    np.testing.assert_allclose(merged.sites["bn"].mean, alone.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.sites["bn"].m2, alone.m2, rtol=1e-12)
