"""The programs in examples/ that are short enough run, and print what they are there to show."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import pytest
import typer
import yaml

from truenorm._cli.app import app

EXAMPLES = Path(__file__).parents[2] / "examples"
BACKEND = keras.config.backend()
ONE_PROCESS = BACKEND == "tensorflow"


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


def printed_by(*command: object) -> str:
    """What a program prints that starts another one, which does not outlive it."""
    started = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        printed, complaint = started.communicate(timeout=240)
        assert started.returncode == 0, complaint
        with pytest.raises(ProcessLookupError):  # nothing of its session is left
            os.killpg(started.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    return printed


@pytest.mark.long
@pytest.mark.parametrize("how", [()] if BACKEND == "torch" else [(), ("processes",)])
def test_a_distributed_training_is_that_of_one_device(how: tuple[str, ...]) -> None:
    distances, ranks = compared(printed_by(EXAMPLES / f"distributed_{BACKEND}.py", *how))
    assert max(distances[:3]) < 1e-6
    assert set(ranks[:4]) == {"agree"}  # frameworks sum the gradients in any case
    without = distances[3:]
    if BACKEND == "jax":  # a batch is that of all devices
        assert max(without) < 1e-6
        assert set(ranks) == {"agree"}
    else:
        assert min(without) > 1e-4
        assert ranks[4:] == ["disagree", "disagree"]


def compared(printed: str) -> tuple[list[float], list[str]]:
    """How far gradient, mean and variance are from those of one device, and who agrees."""
    found = re.findall(r"(\w+): +(\S+) from .* the \w+ (\w+)$", printed, re.MULTILINE)
    assert [name for name, _, _ in found] == ["gradient", "mean", "variance"] * (len(found) // 3)
    return [float(far) for _, far, _ in found], [who for _, _, who in found]


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "jax", reason="programs that JAX maps over devices")
def test_a_mapped_training_is_that_of_one_device() -> None:
    distances, ranks = compared(printed_by(EXAMPLES / "mapped_jax.py"))
    assert len(distances) == 12  # shard_map with and without, pmap with and without
    for first in (0, 6):
        assert max(distances[first : first + 3]) < 1e-6
        assert min(distances[first + 3 : first + 6]) > 1e-4
        assert ranks[first : first + 6] == ["agree"] * 4 + ["disagree"] * 2


@pytest.mark.any_backend
def test_what_kubernetes_shall_run_is_a_command_of_ours() -> None:
    claim, job = yaml.safe_load_all((EXAMPLES / "study_on_kubernetes.yaml").read_text("utf-8"))
    program, study, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, study) == ("truenorm", "study")
    commands: Any = typer.main.get_command(app)
    asked = commands.commands[study].commands["run"].make_context("run", words).params
    assert (asked["model"], asked["data"], asked["runner"]) == ("resnet", "digits", "auto")
    cluster = job["spec"]["rayClusterSpec"]
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (mount,), (volume,) = pod["containers"][0]["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert asked["out"].is_relative_to(mount["mountPath"])
    page = (EXAMPLES.parent / "docs/study_on_ray.md").read_text("utf-8")
    assert f"FROM rayproject/ray:{cluster['rayVersion']}-py" in page
