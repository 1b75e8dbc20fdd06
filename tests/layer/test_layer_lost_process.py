"""JAX: a process of a synchronized training is lost; the other one ends, and says why."""

from __future__ import annotations

from pathlib import Path

import keras
import pytest
import two_processes

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(keras.config.backend() != "jax", reason="processes of JAX"),
]
PROGRAM = Path(__file__).parents[1] / "lost_replica.py"


@pytest.mark.parametrize(
    ("fate", "said"),
    [("killed", "Gloo AllGather failed"), ("stopped", "stopped sending heartbeats")],
)
def test_the_other_process_ends_and_says_why(fate: str, said: str) -> None:
    alone = "--xla_force_host_platform_device_count=1"
    with two_processes.started(PROGRAM, fate, XLA_FLAGS=alone) as (first, _):
        printed = first.communicate(timeout=180)[0]
    assert "first step done" in printed
    assert "second step done" not in printed
    assert first.returncode != 0
    assert said in printed, printed
