"""What truenorm stands on, what it tells, and that it tells it to nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import small_models as models

import truenorm as tn
from truenorm import archive

pytestmark = pytest.mark.any_backend

ROOT = Path(__file__).parents[2]


def test_every_component_is_listed_and_of_a_known_licence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "sbom.py"), str(tmp_path / "sbom.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sbom.json").read_text("utf-8"))
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.5")
    listed = {one["name"]: one for one in found["components"]}
    assert {"keras", "numpy", "h5py", "rich", "lazy-loader"} <= set(listed)
    assert listed["keras"]["version"] == keras.__version__
    assert listed["keras"]["licenses"] == [{"license": {"name": "Apache License 2.0"}}]
    assert str(Path.home()) not in json.dumps(found)


def test_what_the_tools_return_names_no_place_of_this_machine(tmp_path: Path) -> None:
    model = models.shake(models.dense())
    archive.save(model, tmp_path / "model.keras")
    model = archive.load(tmp_path / "model.keras")
    x = models.inputs_for(model)
    records = [
        archive.read(tmp_path / "model.keras"), tn.inspect(model), tn.diagnose(model, x),
        tn.fold(model), tn.collect(model, x, batch_size=4), tn.recalibrate(model, x, batch_size=4),
    ]  # fmt: skip
    places = [str(p) for p in (tmp_path, Path.home(), Path.cwd(), ROOT, Path(sys.prefix))]
    for record in records:
        for text in (record.to_json(), str(record), record._repr_html_()):
            assert [place for place in places if place in text] == [], type(record)


@pytest.mark.long
def test_no_telemetry_is_loaded(tmp_path: Path) -> None:
    model = models.shake(models.dense())
    archive.save(model, tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", models.inputs_for(model))
    code = (
        "import sys; from truenorm._cli import main\n"
        "try: main()\n"
        "except SystemExit as stop:\n"
        "    names = {name.split('.')[0] for name in sys.modules}\n"
        "    talkers = {'openvino_telemetry', 'ray', 'wandb', 'mlflow', 'sentry_sdk'}\n"
        "    print(stop.code, talkers & names, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "recalibrate", str(tmp_path / "model.keras"), "--data",
         str(tmp_path / "x.npy"), "--out", str(tmp_path / "out.keras"), "--no-isolate"],
        capture_output=True, text=True, check=True,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "0 set()"
