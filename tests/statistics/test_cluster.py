"""Shards collected by Ray's tasks and merged are one pass."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from ray_noise import ray_noise
from small_models import dense, shake

import truenorm as tn
from truenorm import cluster

pytestmark = [pytest.mark.any_backend, pytest.mark.long, ray_noise]
X = np.random.default_rng(0).normal(3.0, 2.0, size=(64, 5)).astype("float32")


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tn.MissingDependencyError, match=r"not connected.*call ray\.init\(\) first"):
        cluster.collect(dense(), [X])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(tn.MissingDependencyError, match=r"^Ray is not installed\. Remedy: pip"):
        cluster.collect(dense(), [X])


@pytest.fixture(scope="module")
def ray() -> Generator[Any]:
    found = pytest.importorskip("ray", reason="an extra of its own: pip install 'truenorm[ray]'")
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
               _node_ip_address="127.0.0.1")  # fmt: skip
    yield found
    found.shutdown()


def test_two_shards_are_one_pass(ray: Any) -> None:
    assert ray.is_initialized()
    model = shake(dense("truenorm"))
    second = X[32:]
    merged = cluster.collect(model, [X[:32], lambda: second], batch_size=8)
    alone = tn.collect(model, X, batch_size=8)
    assert (merged.samples, merged.batches) == (alone.samples, alone.batches)
    np.testing.assert_allclose(merged.sites["bn"].mean, alone.sites["bn"].mean, rtol=1e-12)
    np.testing.assert_allclose(merged.sites["bn"].m2, alone.sites["bn"].m2, rtol=1e-12)
    tn.recalibrate(model, merged)
    with pytest.raises(tn.OptionError, match=r"every pass needs all shards"):
        cluster.collect(model, [X], upstream="population")
    with pytest.raises(tn.OptionError, match=r"^There are no shards"):
        cluster.collect(model, [])
