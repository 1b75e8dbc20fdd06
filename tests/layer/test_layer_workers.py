"""synchronized=True on TensorFlow where one of two workers is lost: the other one ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import two_processes

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="workers of tf.distribute"),
]
PROGRAM = Path(__file__).parents[1] / "losing_worker.py"


def ending(how: str) -> dict[str, Any]:
    """What the first worker says; both are ended here."""
    with two_processes.started(PROGRAM, how) as (first, second):
        said = first.communicate(timeout=300)[0]
        second.kill()
        lost = second.communicate()[0]
    assert first.returncode == 0, said
    assert "rank 1 has trained" in lost
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


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
