"""What Windows and macOS lack or have otherwise, seen from here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from truenorm._study.folder import Spec

pytestmark = pytest.mark.any_backend

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, os, pkgutil, subprocess, sys
from pathlib import Path
import keras, numpy as np, truenorm as tn
from truenorm._study.lock import only_driver
from truenorm._study.measure import peak_memory

assert not hasattr(os, "killpg") and peak_memory() is None
for module in pkgutil.walk_packages(tn.__path__, "truenorm."):
    if not module.name.endswith(("__main__", "_study.worker")) and "_kernels" not in module.name:
        importlib.import_module(module.name)

def build():
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(8), tn.BatchNormalization(), keras.layers.ReLU(),
        keras.layers.Dense(2, activation="softmax"),
    ])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model

folder, model = Path(sys.argv[1]), build()
x = np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32")
y = (x.sum(1) > 12).astype("int32")
model.fit(x, y, verbose=0)
tn.recalibrate(model, x)
for _ in range(2):  # a new file, and one that is replaced
    tn.archive.save(tn.fold(model).model, folder / "model.keras")
loaded = tn.archive.load(folder / "model.keras", isolate=True)
assert np.allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
study = tn.study(
    build, ((x, y), (x, y)), positions=["before_activation", "none"], seeds=1, epochs=1,
    directory=folder / "study", workers=1,
)
assert [trial.error for trial in study.trials] == [None, None]
second = '''
import sys; from pathlib import Path; from truenorm._study.lock import only_driver
with only_driver(Path(sys.argv[1])): print("held")
'''
line = [sys.executable, "-c", second, str(folder)]
with only_driver(folder):
    refused = subprocess.run(line, capture_output=True, text=True)
assert f"Received: process {os.getpid()}." in refused.stderr, refused.stderr
print(subprocess.run(line, capture_output=True, text=True).stdout)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="what Windows lacks is taken from Linux")
def test_nothing_is_needed_that_windows_lacks(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "tests" / "like_windows"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "TRUENORM_NATIVE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "held\n\n"


def test_variants_whose_names_differ_in_case_have_files_of_their_own() -> None:
    names = {spec_of(position).file(".json").lower() for position in ("relu", "ReLU", "RELU")}
    assert len(names) == 3


def spec_of(position: str) -> Spec:
    return Spec(
        identity="", position=position, seed=0, epochs=1, batch_size=8, recalibrate=False,
        keep_model=False, costs=False, floatx="float32", dtype_policy="float32",
    )  # fmt: skip


# --- streams that do not hold every character ----------------------------------------------------


def command(folder: Path, encoding: str, *arguments: str) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "truenorm", *arguments], capture_output=True, check=False,
        cwd=folder, env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file, name in (("größe.keras", "größe→"), ("plain.keras", "bn")):
        inputs = keras.Input((5,))
        x = keras.layers.BatchNormalization(name=name)(keras.layers.Dense(3)(inputs))
        keras.Model(inputs, keras.layers.ReLU()(x)).save(tmp_path / file)
    return tmp_path


@pytest.mark.long
def test_output_goes_into_a_pipe_of_windows(folder: Path) -> None:
    code, said, _ = command(folder, "cp1252", "inspect", "plain.keras", "--no-isolate")
    assert code == 0
    assert "Dense \\u2192 ReLU" in said.decode("cp1252")
    code, said, _ = command(folder, "cp1252", "inspect", "größe.keras", "--static")
    assert code == 0
    assert "größe\\u2192" in said.decode("cp1252")


def test_json_is_unicode_in_any_pipe(folder: Path) -> None:
    code, said, _ = command(folder, "cp1252", "inspect", "größe.keras", "--static", "--json")
    assert code == 0
    assert "größe→" in str(json.loads(said.decode("utf-8")))


@pytest.mark.long
def test_what_the_separate_process_says_keeps_its_letters(folder: Path) -> None:
    code, _, said = command(folder, "cp1252", "inspect", "größer.keras")
    assert code == 2
    assert "größer.keras" in said.decode("cp1252")
