"""JAX: a process of a synchronized training is lost; the other one ends, and says why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import pytest

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), port, fate],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed, _ = started[0].communicate(timeout=180)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert "first step done" in printed
    assert "second step done" not in printed
    assert started[0].returncode != 0
    assert said in printed, printed
