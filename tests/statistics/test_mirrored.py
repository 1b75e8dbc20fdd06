"""collect, recalibrate and diagnose under a strategy that mirrors a model's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

PROGRAM = Path(__file__).parents[1] / "mirrored.py"


@pytest.mark.long
@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="strategies are TensorFlow's")
def test_two_replicas_find_what_one_model_finds() -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM], env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
