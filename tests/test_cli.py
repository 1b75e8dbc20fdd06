"""The command: what it answers, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import truenorm.cli


def truenorm_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "truenorm", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_names_the_commands_without_importing_keras() -> None:
    code = (
        "import sys; sys.argv = ['truenorm', '--help']\n"
        "from truenorm.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('keras' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "demo" in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--data", "cifar"], "'cifar' is not one of 'digits', 'breast_cancer'"),
        (["demo", "--backend", "mxnet"], "'mxnet' is not one of 'jax', 'tensorflow', 'torch'"),
        (["demo", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["dmeo"], "No such command 'dmeo'"),
    ],
)
def test_a_wrong_argument_says_what_there_is(arguments: list[str], message: str) -> None:
    done = truenorm_command(*arguments, COLUMNS="200", TERM="dumb")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_backend_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["truenorm", "demo", "--backend", "torch"])
    with pytest.raises(SystemExit) as stop:
        truenorm.cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        'truenorm: The backend torch is not installed. Remedy: pip install "truenorm[torch]".\n'
    )


def test_an_unknown_backend_in_the_environment_is_one_line() -> None:
    done = truenorm_command("demo", KERAS_BACKEND="openvino")
    assert done.returncode == 2
    assert done.stderr == (
        "truenorm: truenorm does not work on this Keras backend (at 'KERAS_BACKEND'). "
        "Expected: jax, tensorflow, torch. Received: openvino.\n"
    )


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = truenorm_command("demo", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "truenorm: The output folder is not empty" in done.stderr
    assert "Remedy: --force replaces an earlier demo there" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_reader_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "truenorm", "--help"]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, check=False, env=os.environ
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
