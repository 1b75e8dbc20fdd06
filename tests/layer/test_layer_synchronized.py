"""synchronized=True: two replicas compute what one does with both their batches."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import EPSILON, array, error, tensor

from truenorm import BatchNormalization
from truenorm._kernels import reference

BACKEND = keras.config.backend()
# JAX spreads equal parts; elsewhere the replicas have batches of different size.
SPLIT = 4 if BACKEND == "jax" else 5


def run(folder: pathlib.Path, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What each replica wrote for each case; ends what it starts."""
    given = [folder / f"given{i}.npz" for i in range(len(cases))]
    for path, case in zip(given, cases, strict=True):
        np.savez(path, **case)
    program = pathlib.Path(__file__).parents[1] / "training_replica.py"
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, program, rank, *given],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (("0", "1") if BACKEND == "torch" else ("0",))
    ]
    try:
        for process in started:
            _, complaint = process.communicate(timeout=120)
            assert process.returncode == 0, complaint
    finally:
        for process in started:
            process.kill()
    ranks = range(len(started))
    return [[dict(np.load(f"{path}.found{rank}.npz")) for rank in ranks] for path in given]


def case(*, masked: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(1000, 0.05, (8, 6, 3)).astype("float32")
    gradient = rng.normal(size=x.shape).astype("float32")
    gamma, beta = (rng.uniform(0.5, 2, 3).astype("float32") for _ in range(2))
    given = {"x": x, "gradient": gradient, "gamma": gamma, "beta": beta, "split": SPLIT}
    if masked:
        mask = rng.random((8, 6)) < 0.5
        mask[SPLIT:] = False  # one replica has no valid value at all
        given["mask"] = mask
    return given


def masked_by_channel() -> dict[str, Any]:
    """Channels first; one of them has no value on one of the replicas."""
    given = case(masked=False) | {"axis": 1}
    rng = np.random.default_rng(1)
    given["gamma"], given["beta"] = (rng.uniform(0.5, 2, 6).astype("float32") for _ in range(2))
    given["mask"] = rng.random((8, 6)) < 0.7
    given["mask"][SPLIT:, 2] = False
    return given


@pytest.mark.parametrize(
    "cases", [[case(masked=False), case(masked=True)], [masked_by_channel()]], ids=["rows", "keras"]
)
def test_two_replicas_are_as_one(cases: list[dict[str, Any]], tmp_path: pathlib.Path) -> None:
    for given, found in zip(cases, run(tmp_path, cases), strict=True):
        x, gamma = given["x"], given["gamma"]
        axis = given.get("axis", -1)
        options: dict[str, Any] = {"axis": axis, "epsilon": EPSILON, "mask": given.get("mask")}
        forward = reference.forward(x, gamma, given["beta"], **options)
        backward = reference.backward(given["gradient"], x, gamma, **options)

        both = {name: np.concatenate([part[name] for part in found]) for name in ("output", "x")}
        both |= {name: sum(part[name] for part in found) for name in ("gamma", "beta")}
        assert error(both["output"], forward.output) < 1e-6
        assert error(both["x"], backward.x) < 1e-6
        assert error(both["gamma"], backward.gamma) < 2e-6
        assert error(both["beta"], backward.beta) < 2e-6
        for part in found:
            assert error(part["moving_mean"], forward.mean) < 1e-7
            assert error(part["moving_variance"], forward.variance) < 1e-6
            if "collectives" in part:
                assert part["collectives"].tolist() == [1, 1]
            if "fitted" in part:
                assert error(part["fitted"], reference.forward(x, axis=axis).variance) < 1e-6


def test_alone_it_is_the_plain_layer() -> None:
    x = np.random.default_rng(0).normal(3, 2, (8, 3))
    layers = [BatchNormalization(synchronized=flag) for flag in (True, False)]
    ours, plain = (array(layer(tensor(x), training=True)) for layer in layers)
    np.testing.assert_array_equal(ours, plain)
    again = BatchNormalization.from_config(layers[0].get_config())
    assert again.synchronized is True
