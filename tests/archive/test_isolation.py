"""The separate process that opens other people's files: what it cannot do, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import pytest
from altered_keras_files import layer_named, with_config
from fresh_process import output_of

import truenorm as tn
from truenorm import archive
from truenorm.archive import _isolation, _limits
from truenorm.archive._isolation import confined

pytestmark = pytest.mark.any_backend

SMALL = 2**28


ALLOWED = {
    "write in the folder", "rename in the folder", "write to nothing", "read outside",
    "a little memory",
}  # fmt: skip


def check_attempts(outcomes: dict[str, str], outside: Path) -> None:
    """What must be possible was, what must not was refused, and outside nothing changed."""
    assert {name for name, outcome in outcomes.items() if outcome == "done"} == ALLOWED
    refused = {outcome for name, outcome in outcomes.items() if name not in ALLOWED}
    assert refused == {"PermissionError", "MemoryError"}
    assert outcomes["much memory"] == "MemoryError"
    assert [(p.name, p.read_bytes()) for p in outside.iterdir()] == [("there", b"precious")]


def test_it_can_write_to_its_folder_only_and_open_no_socket(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"precious")
    arguments = {"outside": str(tmp_path), "parent": os.getpid()}
    with confined("confined_jobs:attempts", arguments, memory=SMALL) as ended:
        assert (ended.code, ended.complaints) == (0, "")
        outcomes = json.loads((ended.folder / "outcomes.json").read_text())
        folder = ended.folder
    assert not folder.exists()
    check_attempts(outcomes, tmp_path)


COPIED = """
import json, os, signal, subprocess, sys
from truenorm.archive import _isolation
from truenorm.archive._isolation import confined
subprocess.Popen = None  # it is not started anew
sys.path.insert(0, sys.argv[1])
job, memory = f"confined_jobs:{sys.argv[2]}", int(sys.argv[3])
given = {} if len(sys.argv) < 5 else {"outside": sys.argv[4], "parent": os.getpid()}
held = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2] == "outlive_exceptions":
    signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
    _isolation.SECONDS = 0.5
if sys.argv[2] == "nothing_open":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as some services start their commands
with confined(job, given, memory=memory, copied=True) as ended:
    made = ended.folder / "outcomes.json"
    made = made.read_text() if made.exists() else None
print(json.dumps([ended.code, len(ended.complaints), made, ended.folder.exists()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is a copy")
def test_a_copy_of_a_process_is_confined_as_a_new_one_is(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"precious")
    jobs = Path(__file__).parents[1]
    shown = output_of(COPIED, jobs, "attempts", SMALL, tmp_path)
    code, complaints, made, exists = json.loads(shown)
    assert (code, complaints, exists) == (0, 0, False)
    check_attempts(json.loads(made), tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is a copy")
def test_how_a_copy_of_a_process_ends_is_told() -> None:
    def ended(job: str) -> Any:
        return json.loads(output_of(COPIED, Path(__file__).parents[1], job, SMALL))

    assert ended("abort") == [-signal.SIGABRT, _isolation.MOST_COMPLAINTS, None, False]
    code, complaints, *_ = ended("fail")
    assert code == 1
    assert 100 < complaints < 10_000  # a traceback
    assert ended("fail_without_a_word") == [1, 0, None, False]
    assert ended("outlive_exceptions")[0] == -signal.SIGALRM
    assert ended("nothing_open")[:2] == [0, 0]


@pytest.mark.long
@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="it is the backend itself")
def test_what_runs_there_leaves_tensorflow_unloaded(tmp_path: Path) -> None:
    layers = [keras.Input((4,)), keras.layers.Dense(2), keras.layers.BatchNormalization()]
    archive.save(keras.Sequential(layers), tmp_path / "m.keras")
    shown = output_of(
        "import sys; from truenorm.archive._isolated_loading import report\n"
        "report(sys.argv[1], path=sys.argv[2], max_parameters=1000, imports=[])\n"
        "print('tensorflow' in sys.modules)",
        tmp_path, tmp_path / "m.keras",
    )  # fmt: skip
    assert (tmp_path / "report.json").read_text() == "null"
    assert shown.splitlines()[-1] == "False"


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_isolation, "SECONDS", 0.5)
    with confined("confined_jobs:sleep", {}, memory=SMALL) as ended:
        pass
    with pytest.raises(tn.ArchiveError) as refused:
        ended.check("f.keras", SMALL)
    assert str(refused.value) == (
        "The file takes too long to load, and was given up (at 'f.keras'). Expected: 0.5 seconds "
        "at most. Remedy: if you trust the file, load it without limits: isolate=False "
        "(--no-isolate)."
    )


def test_a_process_that_crashes_is_one_line() -> None:
    with confined("confined_jobs:abort", {}, memory=SMALL) as ended:
        pass
    assert len(ended.complaints) == _isolation.MOST_COMPLAINTS  # not all three megabytes
    with pytest.raises(tn.ArchiveError) as refused:
        ended.check("f.keras", SMALL)
    assert str(refused.value) == (
        "The file could not be opened within its limits (at 'f.keras'). Expected: 0.25 GiB of "
        "memory at most. Received: the process was ended by SIGABRT. Remedy: if you trust the "
        "file, allow more: max_memory (--max-memory), or isolate=False (--no-isolate)."
    )


def test_memory_is_by_the_size_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(1000))
    base = _limits.memory_for([])
    assert _limits.memory_for([tmp_path / "small", None, tmp_path / "none"]) == base + 16_000
    assert 0 < base <= 4 * _limits.GIB + 64 * 2**20 * (os.cpu_count() or 1)


def test_what_loads_there_is_loaded_here(file: Path) -> None:
    model = archive.load(file, isolate=True)
    assert type(model.get_layer("bn")) is tn.BatchNormalization


def wide_states(tmp_path: Path) -> Path:
    """A recurrent layer that keeps a state for each of sixteen million places of 64 samples."""
    layers = [
        keras.Input((2, 4, 4, 1), batch_size=1, name="in"),
        keras.layers.ConvLSTM2D(2, 3, padding="same", stateful=True),
        keras.layers.BatchNormalization(),
    ]
    keras.Sequential(layers).save(tmp_path / "base.keras")

    def wide(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: wide(inner) for key, inner in value.items()}
        if isinstance(value, list):
            large = [64, 2, 4000, 4000, 1]
            return large if value == [1, 2, 4, 4, 1] else [wide(inner) for inner in value]
        return value

    return with_config(
        tmp_path / "base.keras", lambda c: c.update(wide(c)), tmp_path / "evil.keras"
    )


def test_memory_that_no_variable_asks_for_ends_the_other_process_only(tmp_path: Path) -> None:
    evil = wide_states(tmp_path)
    assert evil.stat().st_size < 100_000
    with pytest.raises(tn.ArchiveError) as refused:
        archive.load(evil, isolate=True, max_memory=3 * 2**29)
    message = str(refused.value)
    assert "max_memory (--max-memory)" in message
    assert message.startswith(
        ("There is not enough memory to load this file (at '", "The file could not be opened")
    )


def test_a_layer_of_more_parameters_than_the_file_holds_is_refused(
    file: Path, tmp_path: Path
) -> None:
    def wide(config: Any) -> None:
        layer_named(config, "hidden")["config"]["units"] = 10_000_000

    with pytest.raises(tn.ArchiveError) as refused:
        archive.load(with_config(file, wide, tmp_path / "wide.keras"))
    assert "far more parameters than the file has values" in str(refused.value)
    assert "Expected: 1000162 parameters at most. Received: 50000000 or more." in str(refused.value)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "truenorm", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )


@pytest.mark.long
def test_memory_that_running_takes_is_one_line_of_the_command(tmp_path: Path) -> None:
    layers = [
        keras.Input((4, 4, 3)),
        keras.layers.UpSampling2D((40_000, 40_000)),
        keras.layers.BatchNormalization(),
    ]
    keras.Sequential(layers).save(tmp_path / "evil.keras")
    done = command("inspect", str(tmp_path / "evil.keras"), "--max-memory", "2")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("truenorm: ")]
    assert lines == [done.stderr.splitlines()[-1]]
    assert "The file could not be opened within its limits" in lines[0]
    assert "Expected: 2 GiB of memory at most" in lines[0]


@pytest.mark.long
def test_a_command_puts_its_file_in_place_and_leaves_nothing_else(
    file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.keras"
    done = command("replace", str(file), "--to", "keras", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"Saved as {out}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out.keras"]
    assert type(archive.load(out).get_layer("bn")) is keras.layers.BatchNormalization
