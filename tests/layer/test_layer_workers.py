"""synchronized=True on TensorFlow where one of two workers is lost: the other one ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="workers of tf.distribute"),
]
PROGRAM = Path(__file__).parents[1] / "losing_worker.py"


def ending(how: str) -> dict[str, Any]:
    """What the first worker says; both are ended here."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROGRAM), str(rank), how, *ports],
            env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said, complaint = running[0].communicate(timeout=300)
    finally:
        for process in running:
            process.kill()
        lost = running[1].communicate()[0]
    assert running[0].returncode == 0, complaint
    assert "rank 1 has trained" in lost
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize(
    ("how", "name", "words"),
    [
        ("killed", "UnavailableError", "Collective ops is aborted by"),
        ("stopped", "UnavailableError", "Collective ops is aborted by"),
        ("never_comes", "DeadlineExceededError", "Collective has timed out during execution"),
        ("killed_eagerly", "UnavailableError", "Collective ops is aborted by"),
        (
            "killed_before_a_tool",
            "DistributedError",
            "Another worker did not take part in the exchange of statistics. Expected: ",
        ),
    ],
)
def test_a_lost_worker_ends_the_other_with_a_clear_error(how: str, name: str, words: str) -> None:
    found = ending(how)
    parts = [np.random.default_rng(rank).normal(rank, 1, (8, 3)) for rank in range(2)]
    np.testing.assert_allclose(found["mean"], np.mean(parts, (0, 1)) / 2, rtol=1e-5)
    assert found["name"] == name
    assert words in found["message"]
