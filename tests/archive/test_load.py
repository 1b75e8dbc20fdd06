"""Models loaded from files of other people, and saved: what is refused, what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import known_to_keras
import numpy as np
import pytest
import small_models as models
from altered_keras_files import layer_named, with_config
from keras.src.backend.common import global_state

import truenorm as tn
from truenorm import archive
from truenorm.archive._classes import CODE, Classes

pytestmark = pytest.mark.any_backend


def huge(config: Any) -> None:
    layer_named(config, "hidden")["config"]["units"] = 5_000_000_000


def huge_batch(config: Any) -> None:
    layer = config["config"]["layers"][0]["config"]
    layer["batch_shape"] = [5_000_000_000, *layer["batch_shape"][1:]]


def a_lambda(config: Any) -> None:
    code = {"class_name": "__lambda__", "config": {"code": "4wAA", "defaults": None}}
    layer_named(config, "relu").update(
        {"class_name": "Lambda", "config": {"name": "relu", "function": code}}
    )


def hidden_lambda(config: Any) -> None:
    layer_named(config, "head")["config"]["activation"] = {
        "class_name": "__lambda__", "config": {"value": "4wAA"}}  # fmt: skip


def unknown(config: Any) -> None:
    layer_named(config, "relu").update(
        {"module": "os", "class_name": "system", "registered_name": "os>system"}
    )


def a_download(config: Any) -> None:
    layer_named(config, "head")["config"]["activation"] = {
        "module": "keras.utils", "class_name": "function", "config": "get_file",
        "registered_name": "get_file"}  # fmt: skip


def a_loader(config: Any) -> None:
    layer_named(config, "head")["config"]["activation"] = {
        "module": "keras.models", "class_name": "function", "config": "load_model",
        "registered_name": "function"}  # fmt: skip


def safety_off(config: Any) -> None:
    layer_named(config, "head")["config"]["activation"] = {
        "module": "keras.config", "class_name": "function",
        "config": "enable_unsafe_deserialization", "registered_name": "function"}  # fmt: skip


def a_secret_as_vocabulary(config: Any) -> None:
    config["config"]["layers"].insert(
        1,
        {"module": "keras.layers", "class_name": "StringLookup", "registered_name": None,
         "config": {"name": "lookup", "vocabulary": "/etc/passwd", "oov_token": "[UNK]"}},
    )  # fmt: skip


def a_name_that_climbs(config: Any) -> None:
    layer_named(config, "relu")["config"]["name"] = "../../climbed"


def a_download_in_disguise(config: Any) -> None:
    a_download(config)
    activation = layer_named(config, "head")["config"]["activation"]
    activation["registered_name"] = "truenorm>BatchNormalization"


def no_graph(config: Any) -> None:
    del layer_named(config, "hidden")["config"]["units"]


def a_wide_constant(config: Any) -> None:
    layer_named(config, "relu")["config"]["threshold"] = {
        "class_name": "__numpy__", "config": {"value": [0.0], "dtype": "S2000000000"}}  # fmt: skip


def one_layer(config: Any) -> None:
    config.update(layer_named(config, "relu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (huge, "Expected: 200000000 parameters at most. Received: 25000000000 or more. Remedy: if "
               "it is right so, allow more: max_parameters (--max-parameters)."),
        (huge_batch, "Expected: 65536 samples at most. Received: 5000000000."),
        (a_lambda, "evil.keras: relu'). Expected: layers of Keras or truenorm that are described "
                   "by their settings. Received: Lambda."),
        (hidden_lambda, "Received: __lambda__."),
        (unknown, "evil.keras: relu'). Expected: a class of Keras or truenorm, or of a module "
                  "that you name. Received: os>system of os."),
        (safety_off, "Received: function of keras.config."),
        (a_secret_as_vocabulary, "Requested the loading of a vocabulary file outside of the model"),
        (a_name_that_climbs, "cannot contain character `/`"),
        (a_loader, "Received: function of keras.models."),
        (a_download, "Received: get_file of keras.utils."),
        (a_download_in_disguise, "Received: truenorm>BatchNormalization of keras.utils."),
        (a_wide_constant, "evil.keras: relu'). Expected: a type such as float32. Received: "
                          "S2000000000."),
        (no_graph, "Keras cannot load this file"),
        (one_layer, "There is no model in this file"),
    ],
)  # fmt: skip
def test_a_configuration_made_to_do_harm_is_refused(
    change: Any, message: str, file: Path, tmp_path: Path
) -> None:
    path = with_config(file, change, tmp_path / "evil.keras")
    with pytest.raises(tn.ArchiveError) as refused:
        archive.load(path)
    assert message in str(refused.value)
    assert keras.Variable(np.zeros(3, "f4")).shape == (3,)  # the counting has ended


@pytest.mark.parametrize("kind", sorted(CODE))
def test_what_holds_code_is_refused_whatever_its_module(kind: str) -> None:
    for module in (None, "keras.layers", "builtins"):
        entry = {"class_name": kind, "config": {"name": "evil"}, "module": module}
        with pytest.raises(tn.ArchiveError, match="The file holds code, which is not run"):
            Classes("f.keras", {"keras", "truenorm"}).check([{"inner": entry}], "")


def test_the_layers_of_kerass_applications_are_allowed_and_their_functions_not() -> None:
    classes = Classes("f.keras", {"keras", "truenorm"})
    classes.check(
        {"module": "keras.src.applications.convnext", "class_name": "LayerScale", "config": {}}, ""
    )
    download = {"module": "keras.applications", "config": "ResNet50"}
    for kind in ("function", "ResNet50"):
        with pytest.raises(tn.ArchiveError, match=r"of keras\.applications"):
            classes.check({**download, "class_name": kind}, "")


def test_everything_that_keras_can_make_from_a_file_was_looked_at() -> None:
    """Fails with a new Keras: does the new thing run code, read files, or take memory unasked?

    Then it belongs into ``_classes.CODE`` or ``TOOLS``, or a hostile file of it into these tests;
    ``tests/torture/hostile.py`` tries it with huge numbers. After that it goes into the list.
    """
    known: set[str] = set()
    area = ""
    for line in Path(__file__).with_name("known_to_keras.txt").read_text("utf-8").splitlines():
        if line.startswith(" "):
            known |= {f"{area}.{name}" for name in line.split()}
        else:
            area = line
    assert len(known) > 1000
    assert sorted(known_to_keras.found() - known) == []


def test_custom_code_runs_only_if_its_module_is_named(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Own(keras.layers.ReLU):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def own(config: Any) -> None:
        layer_named(config, "relu").update(
            {"module": "own_layers", "class_name": "Own", "registered_name": "own>Own"}
        )

    path = with_config(file, own, tmp_path / "own.keras")
    with pytest.raises(tn.ArchiveError, match="--import module"):
        archive.load(path)
    assert "own_layers" not in sys.modules
    model = archive.load(path, imports=["own_layers"])
    assert type(model.get_layer("relu")).__name__ == "Own"
    with pytest.raises(tn.ArchiveError, match="own>Own of own_layers"):
        archive.load(path)  # imported by now, but not named in this call
    with pytest.raises(tn.OptionError, match="cannot be imported"):
        archive.load(path, imports=["no_such_module"])


def test_nothing_is_loaded_in_unsafe_mode(file: Path) -> None:
    keras.config.enable_unsafe_deserialization()
    try:
        with pytest.raises(tn.ArchiveError, match="has switched Keras's safe mode off"):
            archive.load(file)
    finally:
        global_state.set_global_attribute("safe_mode_saving", None)


def test_a_model_can_be_saved_over_the_file_it_came_from(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(file.read_bytes())
    model = archive.load(path, max_parameters=100)
    assert not model.compiled
    x = models.inputs_for(model)
    archive.save(model, path)
    again = archive.load(path)
    assert type(again.get_layer("bn")) is tn.BatchNormalization
    np.testing.assert_array_equal(models.predict(again, x)[0], models.predict(model, x)[0])


def test_a_save_that_is_killed_leaves_the_old_file_whole(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(file.read_bytes())
    code = (
        "import os, signal, sys\n"
        "from truenorm import archive\n"
        "class Model:\n"
        "    def save(self, path):\n"
        "        path.write_bytes(b'half a')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "archive.save(Model(), sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == file.read_bytes()


class _FullDisk:
    def save(self, path: Path) -> None:
        path.write_bytes(b"half a")
        raise OSError(28, "No space left on device")


def test_a_save_that_cannot_be_leaves_the_old_file_whole(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(file.read_bytes())
    with pytest.raises(tn.OutputError, match="No space left on device"):
        archive.save(_FullDisk(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]
    assert path.read_bytes() == file.read_bytes()
    model = archive.load(path)
    for target in (tmp_path / "no" / "folder.keras", Path("/proc/model.keras")):
        with pytest.raises(tn.OutputError, match="The file cannot be written"):
            archive.save(model, target)
    with pytest.raises(tn.OutputError, match=r"a name that ends in \.keras"):
        archive.save(model, tmp_path / "model.h5")
