"""TensorFlow beside another backend: a trial does not load it, and seeds it where it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import under_fire

from truenorm._study.folder import Spec
from truenorm._study.plan import Plan
from truenorm._study.variants import variants_of

pytestmark = [pytest.mark.any_backend, pytest.mark.long]

PROGRAM = """
import random, sys
from pathlib import Path

import keras, numpy
from truenorm._study.seeded import seeded
from truenorm._study.trial import main

def draw():
    return random.random(), numpy.random.rand(), float(keras.random.normal(()))

main(Path(sys.argv[1]))
assert Path(sys.argv[1]).with_name("before_activation-seed0.keras").exists()
assert "tensorflow" not in sys.modules
mine = seeded(3, draw)

def flow():
    import tensorflow
    return tensorflow.random.uniform((3,)).numpy().tolist()

theirs = seeded(3, flow)
assert "tensorflow" in sys.modules
import tensorflow
tensorflow.random.set_seed(3)
assert theirs == flow() != flow()
keras.utils.set_random_seed(3)
assert mine == draw() != draw()
shapes = keras.saving.serialize_keras_object([tensorflow.TensorShape((2, None)), tensorflow.int8])
assert shapes == [[2, None], "int8"], shapes
"""


def test_a_trial_loads_tensorflow_only_if_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    plan = Plan(under_fire.build, under_fire.data, variants_of(under_fire.POSITIONS))
    plan.write(tmp_path)
    spec = Spec("id", "before_activation", 0, 1, 8, True, True, True, "float32", "float32")
    backend = keras.config.backend()
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(spec.write(tmp_path))],
        env={**os.environ, "KERAS_BACKEND": "torch" if backend == "tensorflow" else backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
