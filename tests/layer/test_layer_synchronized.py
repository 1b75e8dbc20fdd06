"""synchronized=True: two replicas compute what one does with both their batches."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import EPSILON, array, error, tensor

from truenorm import BatchNormalization, OptionError
from truenorm._kernels import reference

BACKEND = keras.config.backend()
# JAX spreads equal parts; elsewhere the replicas have batches of different size.
SPLIT = 4 if BACKEND == "jax" else 5


def run(folder: pathlib.Path, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What each replica wrote for each case; ends what it starts."""
    given = [folder / f"given{i}.npz" for i in range(len(cases))]
    for path, case in zip(given, cases, strict=True):
        np.savez(path, **case | {"options": json.dumps(case["options"])})
    program = pathlib.Path(__file__).parents[1] / "training_replica.py"
    # Two processes cannot have one GPU: they compute on processors.
    processors = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    here = {"KERAS_BACKEND": BACKEND, "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **here, **processors}
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
            _, complaint = process.communicate(timeout=480)
            assert process.returncode == 0, complaint
    finally:
        for process in started:
            process.kill()
            process.communicate()
    ranks = range(len(started))
    return [[dict(np.load(f"{path}.found{rank}.npz")) for rank in ranks] for path in given]


def case(shape: tuple[int, ...] = (8, 6, 3), split: int = SPLIT, **options: Any) -> dict[str, Any]:
    """Arrays for a layer with these options."""
    rng = np.random.default_rng(0)
    dtype = "float16" if "dtype" in options else "float32"
    x = rng.normal(*((1, 2) if "dtype" in options else (1000, 0.05)), shape).astype(dtype)
    gradient = rng.normal(size=shape).astype(dtype)
    channels = shape[options.get("axis", -1)]
    gamma, beta = (rng.uniform(0.5, 2, channels).astype("float32") for _ in range(2))
    given = {"x": x, "gradient": gradient, "gamma": gamma, "beta": beta}
    return given | {"split": split, "options": options}


def masked() -> dict[str, Any]:
    """One replica has no valid value at all."""
    given = case()
    given["mask"] = np.random.default_rng(1).random((8, 6)) < 0.5
    given["mask"][SPLIT:] = False
    return given


def masked_by_channel() -> dict[str, Any]:
    """Channels first; one of them has no value on one of the replicas."""
    given = case(axis=1)
    given["mask"] = np.random.default_rng(1).random((8, 6)) < 0.7
    given["mask"][SPLIT:, 2] = False
    return given


CASES = {
    "plain": case() | {"fit": True},
    "channels first": case((8, 3, 4, 5), axis=1),
    "many values": case((64, 9, 9, 5), split=SPLIT * 8),
    "masked": masked(),
    "masked everywhere": masked() | {"mask": np.zeros((8, 6), bool)},
    "masked, channels first": case((8, 3, 6), axis=1) | {"mask": masked()["mask"]},
    "masked by channel": masked_by_channel(),
    "relu": case(activation="relu"),
    "tanh": case(activation="tanh"),
    "renorm": case(renorm=True),
    "half": case(dtype="mixed_float16"),
    "unbiased": case(bessel_correction=True),
    "affine": case(freeze="affine"),
    "frozen": case(trainable=False),
    "statistics": case(freeze="statistics"),
}
if BACKEND == "torch" and find_spec("triton") is not None:
    CASES["two strips"] = case((16, 9, 9, 5), split=10)
    for name in ("plain", "channels first", "two strips", "relu", "half"):
        CASES[f"{name}, on a GPU"] = CASES[name] | {"triton": True}
    CASES["empty, on a GPU"] = case(split=8) | {"triton": True}
MAPPED = ("pmap", "shard_map", "shard_map, unchecked")
"""How a program of JAX is one for each device; the last without a check of what varies."""
if BACKEND == "jax":
    for i, how in enumerate(MAPPED):
        CASES |= {
            f"{name}, {how}": CASES[name] | {"mapped": how, "devices": (2, 4)[(i + j) % 2]}
            for j, name in enumerate(tuple(CASES)[:15])
        }
        CASES[f"second, {how}"] = case() | {"x": case()["x"] - 999, "second": True} | {
            "mapped": how, "devices": 2,
        }  # fmt: skip
    named = case(synchronized=["batch"])
    CASES["named, pmap"] = named | {"mapped": "pmap", "devices": 4}
else:
    CASES["second"] = case() | {"x": case()["x"] - 999, "second": True}
    CASES["empty"] = case(split=8)
    CASES["nothing"] = case((0, 6, 3), split=0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the replicas wrote for each case."""
    wrote = run(tmp_path_factory.mktemp("replicas"), list(CASES.values()))
    return dict(zip(CASES, wrote, strict=True))


@pytest.mark.costly
@pytest.mark.parametrize("name", CASES)
def test_two_replicas_are_as_one(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    given, parts = CASES[name], found[name]
    options = given["options"]
    x, gamma, beta, gradient = (
        given[part].astype("float64") for part in ("x", "gamma", "beta", "gradient")
    )
    one = [1.0] * len(gamma)
    how: dict[str, Any] = {
        "axis": options.get("axis", -1),
        "epsilon": EPSILON,
        "mask": given.get("mask"),
        "fallback": ([0.0] * len(gamma), one),
    }
    moves = options.get("trainable", True) and options.get("freeze") != "statistics"
    # A layer that is frozen is as one whose batch has no value.
    seen = how if moves else how | {"mask": np.zeros(x.shape[:-1], bool)}
    batch = reference.forward(x, **seen)
    scale, offset = gamma, beta
    if options.get("renorm"):
        scale = gamma * np.sqrt(batch.variance + EPSILON)  # the moving ones are still 0 and 1
        offset = beta + gamma * batch.mean
    forward = reference.forward(x, scale, offset, **seen).output
    if options.get("activation") == "relu":
        gradient = np.where(forward > 0, gradient, 0)
        forward = np.maximum(forward, 0)
    if options.get("activation") == "tanh":
        forward = np.tanh(forward)
        gradient = gradient * (1 - forward**2)
    backward = reference.backward(gradient, x, scale, **seen)

    names = [part for part in ("output", "x", "gamma", "beta") if part in parts[0]]
    both = {part: np.concatenate([one[part] for one in parts]) for part in names[:2]}
    both |= {part: sum(one[part] for one in parts) for part in names[2:]}
    near = 2e-3 if "dtype" in options else 1e-6
    assert error(both["output"], forward) < near
    assert error(both["x"], backward.x) < near
    if "gamma" in both:
        want = backward.gamma
        if options.get("renorm"):
            want = want * np.sqrt(batch.variance + EPSILON) + backward.beta * batch.mean
        assert error(both["gamma"], want) < 2e-6
        assert error(both["beta"], backward.beta) < 2e-6
    learns = options.get("freeze") != "affine" and "trainable" not in options
    # TensorFlow's tape watches what it is told to.
    assert ("gamma" in both) == (learns or BACKEND == "tensorflow")
    variance = batch.variance
    if options.get("bessel_correction"):
        variance = variance * (batch.count / (batch.count - 1))
    for part in parts:
        assert error(part["moving_mean"], batch.mean) < 1e-7
        assert error(part["moving_variance"], variance) < 1e-6
        if "fitted" in part:
            assert error(part["fitted"], variance) < 1e-6


@pytest.mark.costly
@pytest.mark.skipif(BACKEND == "jax", reason="there XLA sums: see the next test")
@pytest.mark.parametrize("name", CASES)
def test_one_collective_each_way(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    given = CASES[name]
    channels = len(given["gamma"])
    forward = [f"all_gather {8 * (2 + 2 * channels)}"]
    if BACKEND == "tensorflow":  # a row for each replica
        forward = [f"all_reduce {2 * 4 * (1 + 3 * channels)}"]
    backward = [f"all_reduce {4 * 2 * channels}"]
    if name == "masked by channel":  # by the composite: four numbers per channel and replica
        forward = backward = [f"all_reduce {4 * 2 * 4 * channels}"]
    if name == "masked, channels first" and BACKEND == "tensorflow":  # likewise
        backward = forward
    if name in ("frozen", "statistics"):
        forward = backward = []
    for part in found[name]:
        replicas = 2 if BACKEND == "tensorflow" else 1  # in one process
        assert part["forward"].tolist() == replicas * forward
        assert part["backward"].tolist() == replicas * backward
        if "collectives" in part:  # of the graph
            assert part["collectives"] == replicas * len(forward + backward)


@pytest.mark.costly
@pytest.mark.skipif(BACKEND != "jax", reason="what XLA makes of a batch that is spread")
@pytest.mark.parametrize("name", ["plain", "channels first", "masked", "relu"])
def test_devices_exchange_five_numbers_per_channel(
    name: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    """Mean, what rounding took from it and variance; and the gradients of gamma and beta."""
    given = found[name][0]["collectives"].tolist()
    assert {kind for _, kind in given} == {"all-reduce"}
    assert len(given) <= 3
    # and the count of a mask
    assert sum(numbers(what) for what, _ in given) <= 5 * len(CASES[name]["gamma"]) + 1


@pytest.mark.costly
@pytest.mark.parametrize("name", [name for name in CASES if "mapped" in CASES[name]])
def test_mapped_devices_gather_once_and_sum_once(
    name: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    """Count, two of the mean and the variance; and the gradients of gamma and beta."""
    given = CASES[name]
    channels = len(given["gamma"])
    counts = channels if name.startswith("masked by channel") else 1
    forward, backward = [given["devices"] * (counts + 3 * channels)], [2 * channels]
    if name.startswith(("frozen", "statistics")):
        forward = backward = []
    collectives = found[name][0]["collectives"].tolist()
    exchanged = {
        kind: [numbers(what) for what, its in collectives if its == kind] for _, kind in collectives
    }
    assert exchanged.pop("all-gather", []) == forward
    if given["mapped"] == "shard_map":  # It sums the gradients of gamma and beta besides.
        (summed,) = exchanged.pop("all-reduce", [0])
        assert summed <= 4 * channels
    assert exchanged.pop("all-reduce", []) == ([] if given["mapped"] == "shard_map" else backward)
    assert exchanged == {}


def numbers(what: str) -> int:
    """Of the arrays that XLA names together: f32[2,3]{0,1}."""
    sizes = re.findall(r"[a-z]\w*\[([\d,]*)\]", what)
    return sum(math.prod(map(int, (size or "1").split(","))) for size in sizes)


@pytest.mark.costly
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("second")])
def test_a_derivative_can_be_differentiated(
    name: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    given, parts = CASES[name], found[name]
    x, gamma, gradient = (
        given[name].astype("float64").reshape(-1, 3) for name in ("x", "gamma", "gradient")
    )
    first = SPLIT * given["x"].shape[1]

    def loss(x: np.ndarray) -> float:
        """The sum of squares of the gradients of x and, for each replica, of gamma."""
        batch = reference.forward(x)
        normalized = gradient * batch.output
        own = [normalized[:first].sum(0), normalized[first:].sum(0)]
        if name == "second, shard_map":  # There each has the gradient from all of them.
            own = [normalized.sum(0)] * 2
        d_x = reference.backward(gradient, x, gamma[0]).x
        return np.square(d_x).sum() + np.square(own).sum()

    true = np.empty_like(x)
    for at in np.ndindex(*x.shape):  # by differences
        step = np.zeros_like(x)
        step[at] = 1e-6
        true[at] = (loss(x + step) - loss(x - step)) / 2e-6
    true = true.reshape(given["x"].shape)
    assert error(np.concatenate([part["second"] for part in parts]), true) < 1e-5
    for part in parts if BACKEND == "torch" else ():
        assert part["constant"].tolist() == []  # x needs no gradient, and gamma's are one's own


def test_alone_it_is_the_plain_layer() -> None:
    x = np.random.default_rng(0).normal(3, 2, (8, 3))
    layers = [BatchNormalization(synchronized=flag) for flag in (True, False)]
    ours, plain = (array(layer(tensor(x), training=True)) for layer in layers)
    np.testing.assert_array_equal(ours, plain)
    again = BatchNormalization.from_config(layers[0].get_config())
    assert again.synchronized is True


def test_names_of_axes_are_kept_and_mean_nothing_alone() -> None:
    x = np.random.default_rng(0).normal(3, 2, (8, 3))
    named = BatchNormalization(synchronized=["batch", "model"])
    ours, plain = (array(one(tensor(x), training=True)) for one in (named, BatchNormalization()))
    np.testing.assert_array_equal(ours, plain)
    saved = json.loads(json.dumps(keras.saving.serialize_keras_object(named)))
    assert keras.saving.deserialize_keras_object(saved).synchronized == ("batch", "model")
    assert BatchNormalization(synchronized="batch").synchronized == ("batch",)


@pytest.mark.parametrize("given", ["", (), ["batch", 3], 7, None], ids=repr)
def test_what_is_neither_a_choice_nor_a_name_is_refused(given: Any) -> None:
    with pytest.raises(OptionError) as caught:
        BatchNormalization(synchronized=given)
    assert str(caught.value) == (
        "`synchronized` says whether the replicas of BatchNormalization go together. Expected: "
        f"True, False, or names of axes of devices, as 'batch'. Received: {given!r}."
    )
