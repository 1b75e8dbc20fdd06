"""The commands as their user meets them: help, examples, files that are there, labels, remedies."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import small_models as models
from altered_keras_files import layer_named, with_config

import truenorm as tn
import truenorm._cli
from truenorm import archive
from truenorm._cli.examples import EXAMPLES
from truenorm._cli.files import check_free
from truenorm._cli.remedies import with_commands

pytestmark = pytest.mark.any_backend

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """The command in this process, in a folder with a model and data."""
    model = models.shake(models.dense())
    archive.save(model, tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    tn.recalibrate(model, x)  # labels that it would meet with these statistics
    np.savez(tmp_path / "train.npz", x=x, y=model.predict(x, verbose=0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["truenorm", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as stop:
            truenorm._cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_command_has_an_example_in_its_help(name: str, option: str, command: Command) -> None:
    code, output, _ = command(*name.split(), option)
    assert code == 0
    assert f"Example: {EXAMPLES[name]}" in " ".join(output.split())


MARKED = [
    pytest.param("demo", marks=pytest.mark.long),
    *(pytest.param(n, marks=pytest.mark.other_packages) for n in ("study run", "study merge")),
]


@pytest.mark.parametrize(
    "name", [*(n for n in EXAMPLES if n != "demo" and not n.startswith("study")), *MARKED]
)
def test_the_example_runs_as_it_stands(name: str, command: Command, tmp_path: Path) -> None:
    needed = {"study merge": ["study run"]}
    for before in needed.get(name, []):
        assert command(*shlex.split(EXAMPLES[before])[1:])[0] == 0
    if name == "study merge":
        (tmp_path / "wine").rename(tmp_path / "wine-of-another-machine")
        assert command(*shlex.split(EXAMPLES["study run"])[1:])[0] == 0
    names = [*shlex.split(EXAMPLES[name])[1:]]
    here = ["--no-isolate"] if name in ("inspect", "diagnose", "place", "fold", "replace",
                                        "recalibrate") else []  # fmt: skip
    code, output, errors = command(*names, *here)
    assert (code, errors if code else "") == (1 if name == "diagnose" and code else 0, "")
    assert output
    if name == "study run":
        assert command(*shlex.split(EXAMPLES["study show"])[1:])[0] == 0
        assert (tmp_path / "wine.html").is_file()


def test_the_version_is_the_packages(command: Command) -> None:
    assert command("--version") == (0, f"truenorm {tn.__version__}\n", "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("truenorm re", {"recalibrate", "replace"}), ("truenorm study sh", {"show"}),
     ("truenorm fold m.keras --for", {"--force"}), ("truenorm demo --back", {"--backend"})],
)  # fmt: skip
def test_a_shell_completes_commands_and_options(typed: str, offered: set[str]) -> None:
    words = typed.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "truenorm"], capture_output=True, text=True, check=False,
        env={**os.environ, "_TRUENORM_COMPLETE": "complete_bash", "COMP_WORDS": typed,
             "COMP_CWORD": str(len(words) - 1)},
    )  # fmt: skip
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["inspect", "m.keras", "--bakend", "jax"], "--backend"),
        (["study", "mlp", "--data", "d", "--epoch", "3", "--out", "o"], "--epochs"),
        (["daignose", "m.keras"], "Did you mean 'diagnose'?"),
        (["study", "shwo", "wine"], "(at 'shwo'). Remedy: write show."),
        (
            ["place", "m.keras", "befor_activation", "--out", "o.keras"],
            "Remedy: write before_activation.",
        ),
        (["study", "run", "mlp"], "Remedy: truenorm study run --help shows what there is."),
    ],
)
def test_what_is_misspelt_is_answered_with_what_was_meant(
    arguments: list[str], answer: str, command: Command
) -> None:
    code, output, errors = command(*arguments)
    assert (code, output) == (2, "")
    assert answer in errors


# --- files ---------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_before_anything_is_loaded(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("truenorm._cli.models.model_of", load)
    (tmp_path / "folder.keras").mkdir()
    for out, problem in (
        ("model.keras", "There is such a file already (at 'model.keras'). Remedy: add --force to "),
        (
            "no/new.keras",
            "The file cannot be written (at 'no/new.keras'). Expected: a folder that ",
        ),
        ("folder.keras", "Expected: a file: this is a folder or a device."),
        ("new.h5", "Expected: a name that ends in .keras."),
    ):
        for isolate in ("--isolate", "--no-isolate"):
            code, output, errors = command("fold", "model.keras", "--out", out, isolate)
            assert (code, output) == (2, "")
            assert problem in errors
    for report, problem in (("r.txt", "ends in .html"), ("no/r.html", "a folder that exists")):
        code, _, errors = command("study", "mlp", "--data", "wine", "--epochs", "1", "--out", "o",
                                  "--report", report)  # fmt: skip
        assert (code, problem in errors) == (2, True)
    assert command("diagnose", "model.keras", "--select", "TN9", "--no-isolate")[0] == 2
    assert command("diagnose", "model.keras", "--data", "no.npy", "--no-isolate")[0] == 2
    assert command("diagnose", "model.keras", "--data", "train.npz", "--loss", "mean_sqared_error",
                   "--no-isolate")[2].endswith("Remedy: write mean_squared_error.\n")  # fmt: skip


@pytest.mark.other_packages
def test_a_study_of_conversions_by_name(command: Command) -> None:
    study = [
        "study",
        "mlp:8",
        "--data",
        "wine",
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--runner",
        "here",
    ]
    code, output, errors = command(*study, "--out", "o", "--variants", "before_activation,group:4")
    assert code == 0, errors
    assert "group:4" in output
    code, _, errors = command(*study, "--out", "p", "--variants", "before_activation,gruop")
    assert code == 2
    assert errors.endswith("Remedy: write group.\n")


def test_force_replaces_a_file(command: Command, tmp_path: Path) -> None:
    done = command(
        "place", "model.keras", "none", "--out", "model.keras", "--force", "--no-isolate"
    )
    assert done[0] == 0
    layers = archive.load(tmp_path / "model.keras").layers
    assert [type(layer).__name__ for layer in layers] == ["Dense", "ReLU", "Dense"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(tn.OutputError, match="may be written"):
        check_free(tmp_path / "m.keras", force=False, ending=".keras")


# --- labels --------------------------------------------------------------------------------------


def test_labels_are_used_with_the_loss_that_is_named(command: Command) -> None:
    asked = ["diagnose", "model.keras", "--data", "train.npz", "--select", "TN110", "--json",
             "--no-isolate"]  # fmt: skip
    code, output, errors = command(*asked)
    assert "loss" not in json.loads(output)["findings"][0]["evidence"]
    assert errors == (
        "truenorm: The labels in train.npz are not used. "
        "Remedy: add --loss, with the model's own.\n"
    )
    code, output, errors = command(*asked, "--loss", "mse", "--metric", "mae")
    evidence = json.loads(output)["findings"][0]["evidence"]
    assert (code, errors) == (1, "")
    assert any("loss" in name or "mean_absolute_error" in name for name in evidence)
    code, _, errors = command(*asked, "--loss", "mse", "--from-logits")
    assert (code, "This loss knows no logits" in errors) == (2, True)
    code, _, errors = command(*asked, "--metric", "mae")
    assert (code, "A metric is given without a loss" in errors) == (2, True)


def test_labels_of_a_model_with_several_inputs_and_outputs(
    tmp_path: Path, command: Command
) -> None:
    inputs = {"left": keras.Input((3,), name="left"), "right": keras.Input((2,), name="right")}
    x = keras.layers.BatchNormalization()(keras.layers.Concatenate()([*inputs.values()]))
    outputs = {name: keras.layers.Dense(1, name=name)(x) for name in ("price", "churn")}
    archive.save(keras.Model(inputs, outputs), tmp_path / "two.keras")
    random = np.random.default_rng(0)
    data = {"left": random.normal(5, 1, (64, 3)), "right": random.normal(0, 4, (64, 2))}
    labels = {name: random.normal(size=(64, 1)) for name in outputs}
    np.savez(tmp_path / "labelled.npz", **data, **labels)
    np.savez(tmp_path / "bare.npz", **data)
    np.savez(tmp_path / "misnamed.npz", x_left=data["left"], x_right=data["right"])
    asked = ["diagnose", str(tmp_path / "two.keras"), "--select", "TN110", "--json",
             "--no-isolate", "--loss", "mse", "--data"]  # fmt: skip
    code, output, errors = command(*asked, str(tmp_path / "labelled.npz"))
    assert (code, errors) == (1, "")
    assert "loss in training" in str(json.loads(output)["findings"]).replace("_", " ")
    code, _, errors = command(*asked, str(tmp_path / "bare.npz"))
    assert (code, errors) == (2, (
        "truenorm: A loss is given without labels (at '--loss'). Expected: --data with an .npz "
        "file that holds x and y, or one array per input and per output of the model, under its "
        "name (y for the only output).\n"
    ))  # fmt: skip
    code, _, errors = command(*asked, str(tmp_path / "misnamed.npz"))
    assert (code, errors.count("\n")) == (2, 1)
    assert "Expected: the names ['left', 'right']. Received: ['x_left', 'x_right']" in errors


def test_a_model_that_puts_out_logits(tmp_path: Path, command: Command) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn"),
                              keras.layers.Dense(3)])  # fmt: skip
    archive.save(model, tmp_path / "logits.keras")
    x = np.random.default_rng(0).normal(5.0, 2.0, (64, 4)).astype("float32")
    np.savez(tmp_path / "labelled.npz", x=x, y=np.arange(64) % 3)
    asked = ["diagnose", str(tmp_path / "logits.keras"), "--data", str(tmp_path / "labelled.npz"),
             "--select", "TN110", "--json", "--no-isolate", "--loss",
             "sparse_categorical_crossentropy"]  # fmt: skip
    found = json.loads(command(*asked)[1])
    assert [one["codes"] for one in found["skipped"]] == [["the loss"]]
    assert "--from-logits" in found["skipped"][0]["reason"]
    found = json.loads(command(*asked, "--from-logits")[1])
    assert not found["skipped"]
    assert "loss_in_inference" in found["findings"][0]["evidence"]


# --- remedies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("tn.recalibrate(model, data)",
         "truenorm recalibrate m.keras --data 'my data.npz' --out new.keras"),
        ("tn.recalibrate(model, data); and its undo(), if the model does worse",
         "truenorm recalibrate m.keras --data 'my data.npz' --out new.keras; keep the old file, if "
         "the new one does worse"),
        ("tn.recalibrate(model, data, layers='head/*')",
         "truenorm recalibrate m.keras --data 'my data.npz' --layers 'head/*' --out new.keras"),
        ("tn.recalibrate(model, data, layers=['a)b', 'c'])",
         "truenorm recalibrate m.keras --data 'my data.npz' --layers 'a)b' --layers c --out "
         "new.keras"),
        ("tn.recalibrate(model, data, layers=lambda layer: layer.trainable)", None),
        ("model = tn.fold(model, where='bn').model",
         "truenorm fold m.keras --where bn --out new.keras"),
        ('model = tn.place(model, "none", where=\'bn\').model',
         "truenorm place m.keras none --where bn --out new.keras"),
        ('model = tn.place(model, "before_activation").model, trained anew',
         "truenorm place m.keras before_activation --out new.keras, trained anew"),
        ('model = tn.replace(model, to="truenorm").model',
         "truenorm replace m.keras --to truenorm --out new.keras"),
        ('model = tn.replace(model, to="truenorm").model; tn.freeze(model, "statistics")', None),
        ("none for it; tn.fold(model) folds the others",
         "none for it; truenorm fold m.keras --out new.keras folds the others"),
        ("tn.diagnose(model, data, y)",
         "truenorm diagnose m.keras --data 'my data.npz' --loss LOSS"),
        ("keras.layers.Dense(…, use_bias=False)", None),
    ],
)  # fmt: skip
def test_a_remedy_is_a_command_where_there_is_one(call: str, expected: str | None) -> None:
    finding = tn.Finding("TN101", "note", "p", "bn", {}, call)
    found = with_commands(tn.Diagnosis("net", (finding,), ()), Path("m.keras"), Path("my data.npz"))
    assert found.findings[0].remedy == (expected or call)


def test_the_remedy_that_is_printed_can_be_pasted(command: Command) -> None:
    _, output, _ = command("diagnose", "model.keras", "--data", "train.npz", "--select", "TN1",
                           "--no-isolate")  # fmt: skip
    (line,) = [one for one in output.splitlines() if "truenorm recalibrate" in one]
    remedy = shlex.split(line.partition(": ")[2])
    assert command(*remedy[1:], "--no-isolate")[0] == 0


# --- progress ------------------------------------------------------------------------------------


@pytest.mark.long
def test_progress_of_the_separate_process_is_shown_by_this_one(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truenorm._model.progress.is_terminal", lambda: True)
    code, _, errors = command("inspect", "model.keras", "--json", "--max-memory", "16")
    assert code == 0
    assert "\rinspecting: running fit" in errors
    assert re.search("\r +\r", errors)  # wiped; TensorFlow may say something after it
    assert "\x1e" not in errors


# --- code in files -------------------------------------------------------------------------------


def test_static_reading_names_what_holds_code_nested_too(tmp_path: Path, command: Command) -> None:
    double = lambda x: 2 * x  # noqa: E731 - what a file holds the code of
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(double, name="twice")])
    steps = keras.layers.TimeDistributed(keras.layers.Lambda(double, name="step"), name="steps")
    model = keras.Sequential(
        [keras.Input((3, 4)), steps, keras.layers.Dense(4, name="head"),
         keras.layers.BatchNormalization(name="bn")], name="net",
    )  # fmt: skip
    outer = keras.Sequential([keras.Input((4,)), inner], name="outer")
    model.save(tmp_path / "a.keras")
    outer.save(tmp_path / "b.keras")
    code = archive.read(tmp_path / "a.keras").code
    assert [(one.path, one.what) for one in code] == [
        ("steps/step", "Lambda"), ("steps/step", "a Python lambda"),
    ]  # fmt: skip
    nested = archive.read(tmp_path / "b.keras").code
    assert {one.path for one in nested} == {f"{inner.name}/twice"}
    exit_code, output, _ = command("inspect", "a.keras", "--static", "--no-isolate")
    assert exit_code == 0
    assert "Runs code if it is loaded: steps/step (Lambda)." in output

    def own_initializer(config: Any) -> None:
        layer_named(config, "hidden")["config"]["kernel_initializer"] = {
            "module": "evil.code", "class_name": "Init", "registered_name": "evil>Init",
            "config": {},
        }  # fmt: skip

    changed = with_config(tmp_path / "model.keras", own_initializer, tmp_path / "changed.keras")
    assert [(one.path, one.what) for one in archive.read(changed).code] == [
        ("hidden", "evil>Init, which is code of evil")
    ]
