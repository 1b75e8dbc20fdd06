"""synchronized=True on PyTorch in processes that train, run out of batches, or are lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import EPSILON, error

from truenorm._kernels import reference

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(keras.config.backend() != "torch", reason="processes of torch.distributed"),
]
PROGRAM = Path(__file__).parents[1] / "forked_replicas.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes wrote what they found."""
    out = tmp_path_factory.mktemp("processes")
    program = [sys.executable, "-W", "ignore", str(PROGRAM), str(out)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return out


def read(folder: Path, situation: str, ranks: tuple[int, ...] = (0, 1)) -> list[Any]:
    return [json.loads((folder / f"{situation} {rank}.json").read_text()) for rank in ranks]


def batch(rank: int, rows: int) -> np.ndarray:
    """As in the program."""
    return np.random.default_rng(rank).normal(rank, 1, (rows, 3)).astype("float32")


REMEDY = (
    "Expected: 2 processes that call the layer, and its backward pass, equally often and in one "
    "order. Received: "
)


@pytest.mark.parametrize(
    ("situation", "received"),
    [
        ("killed_before_forward", "Connection"),
        ("killed_before_backward", "Connection"),
        ("never_comes", "Timed out waiting 5000ms"),
    ],
)
def test_a_lost_process_ends_the_others_with_a_clear_error(
    situation: str, received: str, folder: Path
) -> None:
    (found,) = read(folder, situation, (0,))
    assert not (folder / f"{situation} 1.json").exists()
    assert found["name"] == "DistributedError"
    problem = "Another process did not take part in synchronized BatchNormalization. "
    assert problem + REMEDY in found["message"]
    assert received in found["message"]
    assert "the timeout= of torch.distributed.init_process_group" in found["message"]


def test_processes_train_as_one_though_the_last_step_is_uneven(folder: Path) -> None:
    expected = json.loads((folder / "as_one.json").read_text())
    for found in read(folder, "data_parallel"):
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


def test_join_is_refused_unless_it_ends_early(folder: Path) -> None:
    for found in read(folder, "joins"):
        assert found["False"]["name"] == "DistributedError"
        assert "Expected: join(throw_on_early_termination=True)" in found["False"]["message"]
        assert found["True"]["name"] == "RuntimeError"
        assert "exhausted" in found["True"]["message"]


def test_the_group_is_that_of_the_wrapper(folder: Path) -> None:
    for rank, found in enumerate(read(folder, "groups")):
        assert found["calls"] == []
        np.testing.assert_allclose(found["mean"], batch(rank, 4).mean(0) / 2, rtol=1e-6)


def test_micro_batches_of_all_processes_are_one_step(folder: Path) -> None:
    x = np.concatenate([batch(10 * each + r, 3 + each + 2 * r) for each in (0, 1) for r in (0, 1)])
    forward = reference.forward(x)
    for found in read(folder, "accumulation"):
        first, second = np.array(found)
        assert first.tolist() == [[0.0] * 3, [1.0] * 3]
        assert error(second[0], forward.mean / 2) < 1e-6
        assert error(second[1], (forward.variance + 1) / 2) < 1e-6


def test_a_domain_is_that_of_all_processes(folder: Path) -> None:
    parts = read(folder, "domains")
    x = np.concatenate([batch(rank, 5) for rank in (0, 1)])
    own = np.array([0, 1, 1, 0, 1] + [0] * 5)
    gradient = np.arange(15.0).reshape(5, 3)
    gradient = np.concatenate([gradient, gradient + 1])
    output, d_x = (np.concatenate([part[name] for part in parts]) for name in ("output", "x"))
    for domain in (0, 1):
        rows = x[own == domain]
        forward = reference.forward(rows)
        assert error(output[own == domain], forward.output) < 1e-6
        backward = reference.backward(gradient[own == domain], rows, epsilon=EPSILON)
        assert error(d_x[own == domain], backward.x) < 2e-6
        for part in parts:
            mean, variance = np.array(part["by_sample"])
            assert error(mean[domain], forward.mean / 2) < 1e-6
            assert error(variance[domain], (forward.variance + 1) / 2) < 1e-6
    forward = reference.forward(x)
    for part in parts:
        mean, variance = np.array(part["one"])
        assert not mean[0].any()
        assert error(mean[1], forward.mean / 2) < 1e-6
        assert error(variance[1], (forward.variance + 1) / 2) < 1e-6


def test_processes_in_different_domains_are_refused(folder: Path) -> None:
    for part in read(folder, "domains"):
        assert part["apart"]["name"] == "DistributedError"
        assert (
            "The processes of synchronized BatchNormalization are in different domains. "
            "Expected: one domain for all of them in a call. Received: domains [0, 1]. Remedy: "
            "give the domain of each sample, domain=..., in the call of the layer."
        ) in part["apart"]["message"]
