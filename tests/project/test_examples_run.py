"""The programs in examples/ that are short enough run, and print what they are there to show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_PROCESS = keras.config.backend() == "tensorflow"


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("monitor", ["bn_distance", "TN202 after epoch 1: dead channels", "Found meanwhile"]),
        ("conversion", ["group", "replace to affine: 2 of 2 sites changed", "as a frozen map"]),
        ("synchronized_statistics",
         ["Nothing to synchronize"] if ONE_PROCESS else ["They counted for", "process 1: sum"]),
    ],
)  # fmt: skip
def test_it_runs(name: str, shown: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        capture_output=True, text=True, check=False, env=os.environ, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in shown:
        assert text in done.stdout
