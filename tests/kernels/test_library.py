"""The compiled passes by themselves, on NumPy arrays: layouts, dtypes, threads, edges of memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from layer_cases import error

from truenorm._kernels import library, reference

pytestmark = pytest.mark.any_backend

TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# Rows and columns that do not fill the blocks; the largest are enough for several threads.
SHAPES = [
    *((1, 3, 1), (2, 1, 1), (7, 5, 1), (65, 33, 1), (1000, 1, 1), (8003, 37, 1), (300, 600, 1)),
    *((1, 3, 2), (3, 1, 7), (2, 5, 63), (2, 3, 64), (3, 4, 65), (2, 3, 9000), (6, 70, 700)),
    (50, 37, 49),
]
GUARD = 64


@dataclass(frozen=True)
class Step:
    """All results of one training step."""

    y: Any
    mean: Any
    variance: Any
    low: Any
    rstd: Any
    d_x: Any
    d_gamma: Any
    d_beta: Any


def guarded(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """An array, and the memory around it, all of one pattern."""
    memory = np.full(math.prod(shape) * np.dtype(dtype).itemsize + 2 * GUARD, 0xA5, np.uint8)
    return memory[GUARD:-GUARD].view(dtype).reshape(shape), memory


def address(array: Any) -> int:
    return 0 if array is None else array.ctypes.data


def step(
    x: Any,
    dy: Any,
    gamma: Any,
    beta: Any,
    *,
    relu: bool = False,
    threads: int = 2,
    mask: Any = None,
) -> Step:
    """Forward and backward; nothing outside the results may be written."""
    name = np.dtype(x.dtype).name
    wide = np.float64 if name == "float64" else np.float32
    (y, around_y), (d_x, around_d_x) = (guarded(x.shape, x.dtype) for _ in range(2))
    rows, around_rows = guarded((6, x.shape[1]), wide)
    mean, variance, low, rstd, dgamma, dbeta = map(address, rows)
    gamma, beta = (None if a is None else np.ascontiguousarray(a, wide) for a in (gamma, beta))
    both = library.Call(
        *(*x.shape, library.DTYPES[name]),
        relu=relu,
        threads=threads,
        epsilon=1e-3,
        parallel=library.own_threads(),
        x=address(x),
        gamma=address(gamma),
        beta=address(beta),
        mean=mean,
        variance=variance,
        low=low,
        rstd=rstd,
        mask=address(mask),
    )
    library.run("tn_forward", both._replace(y=address(y)))
    backward = both._replace(dy=address(dy), dgamma=dgamma, dbeta=dbeta, y=address(d_x))
    library.run("tn_backward", backward)
    for memory in (around_y, around_d_x, around_rows):
        assert (memory[:GUARD] == 0xA5).all()
        assert (memory[-GUARD:] == 0xA5).all()
    return Step(y, *rows[:4], d_x, *rows[4:])


def draw(shape: tuple[int, ...], dtype: str, mean: float = 0.5) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    x, dy = (rng.normal(m, 1.5, shape).astype(TYPES[dtype]) for m in (mean, 0))
    gamma, beta = rng.uniform(0.5, 2, shape[1]), rng.normal(size=shape[1])
    return x, dy, *(a.astype("float32").astype("float64") for a in (gamma, beta))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_the_oracles(shape: tuple[int, ...], dtype: str, relu: bool) -> None:
    x, dy, gamma, beta = draw(shape, dtype)
    have = step(x, dy, gamma, beta, relu=relu)
    true = reference.forward(x, gamma, beta, axis=1)
    upstream = np.float64(dy) * (true.output > 0) if relu else dy
    want = reference.backward(upstream, x, gamma, axis=1)
    # Sums of float64 have no wider type to be joined in.
    one, wide = (16 * EPS[dtype],) * 2 if dtype == "float64" else (EPS[dtype], EPS["float32"])
    deviation = np.sqrt(true.variance)
    assert error(have.y, np.maximum(true.output, 0) if relu else true.output) < 2 * one
    assert (abs(np.float64(have.mean) + have.low - true.mean) <= wide * deviation).all()
    assert error(have.variance, true.variance) < 2 * wide
    assert error(have.rstd, 1 / np.sqrt(true.variance + 1e-3)) < 2 * wide
    # Where little is left of a difference, it is what the difference is of that is rounded.
    size = np.abs(np.float64(dy)).max() * np.abs(gamma * have.rstd).max()
    assert np.abs(np.float64(have.d_x) - want.x).max() < 2 * one * size
    for total, exact in ((have.d_gamma, want.gamma), (have.d_beta, want.beta)):
        assert np.abs(total - exact).max() < 4 * wide * np.abs(np.float64(dy)).sum((0, 2)).max()


@pytest.mark.parametrize("shape", [(8003, 37, 1), (6, 70, 700)], ids=str)
def test_the_same_bits_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    drawn = draw(shape, "float32")
    one, *others = (step(*drawn, relu=True, threads=n) for n in (1, 2, 3, 64))
    for other in others:
        for name in Step.__dataclass_fields__:
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    inputs = [draw((8003, 37, 1), "float32", mean=k) for k in range(8)]
    alone = [step(*drawn) for drawn in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for a, b in zip(alone, pool.map(lambda drawn: step(*drawn), inputs), strict=True):
                assert a.y.tobytes() == b.y.tobytes()
                assert a.d_x.tobytes() == b.d_x.tobytes()


@pytest.mark.parametrize("shape", [(4096, 7, 1), (64, 7, 64)], ids=str)
@pytest.mark.parametrize("order", ["sorted", "first_zero", "last_huge"])
def test_an_order_that_misleads_the_shift_costs_no_digits(
    shape: tuple[int, ...], order: str
) -> None:
    """The shift is the mean of what came before, at first of eight rows."""
    x, dy, gamma, beta = draw(shape, "float32", mean=1000)
    if order == "sorted":
        x = np.sort(x.ravel()).reshape(shape)
    elif order == "first_zero":
        x[: shape[0] // 4] = 0
    else:
        x[-1] = 1e7
    have = step(x, dy, gamma, beta)
    true = reference.forward(x, gamma, beta, axis=1)
    off = abs(np.float64(have.mean) + have.low - true.mean)
    assert (off <= EPS["float32"] * np.sqrt(true.variance)).all()
    assert error(have.variance, true.variance) < 2 * EPS["float32"]
    assert error(have.y, true.output) < 2 * EPS["float32"]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("inner", [1, 2, 3, 8, 49])
def test_a_first_sample_unlike_the_others_costs_few_digits(inner: int, constant: bool) -> None:
    x, dy, gamma, beta = draw((2048 // inner, 3, inner), "float32", mean=1000)
    if constant:
        x[:] = 1000.3
    x[:1] = 0
    have = step(x, dy, gamma, beta)
    true = reference.forward(x, gamma, beta, axis=1)
    assert error(have.variance, true.variance) < 16 * EPS["float32"]
    assert error(have.y, true.output) < 16 * EPS["float32"]


def test_gamma_and_beta_may_be_missing() -> None:
    x, dy, *_ = draw((65, 33, 1), "float32")
    without, with_them = step(x, dy, None, None), step(x, dy, np.ones(33), np.zeros(33))
    assert without.y.tobytes() == with_them.y.tobytes()
    assert without.d_x.tobytes() == with_them.d_x.tobytes()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(200, 3, 1), (3, 3, 70)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_constant_of_the_largest_size_is_normalised_to_beta(
    shape: tuple[int, ...], dtype: str, sign: int
) -> None:
    _, dy, gamma, beta = draw(shape, dtype)
    x = np.full(shape, sign * ml_dtypes.finfo(TYPES[dtype]).max, TYPES[dtype])
    have = step(x, dy, gamma, beta)
    wide = np.float64 if dtype == "float64" else np.float32
    assert (have.mean == wide(x[0, 0, 0])).all()
    assert (have.variance == 0).all()
    rounded = np.broadcast_to(beta[:, None], shape).astype(wide).astype(TYPES[dtype])
    assert have.y.tobytes() == rounded.tobytes()
    want = reference.backward(dy, np.zeros(shape), gamma, axis=1)
    assert error(have.d_x, want.x) < 4 * EPS[dtype]
    assert np.abs(have.d_gamma).max() < 4 * EPS["float32"] * np.abs(np.float64(dy)).sum()


def infer(x: Any, scale: Any) -> Any:
    """x scale, one scale per column."""
    rows = np.zeros((3, x.shape[1]), np.float32)
    rows[1], rows[2] = 1, scale
    y, mean, variance, gamma = np.empty_like(x), *map(address, rows)
    call = library.Call(*x.shape, 1, library.DTYPES[np.dtype(x.dtype).name], x=address(x))
    library.run("tn_infer", call._replace(y=address(y), mean=mean, variance=variance, gamma=gamma))
    return y


def check_conversions(dtype: str) -> None:
    """Every number of 16 bits, times factors that make it subnormal, infinite, and in between."""
    scale = np.float32([1, -1, 1 / 3, 1.001, 2.0**-9, 2.0**-14, 0.7e-5, 7, 3e4, 0, 1 + 2.0**-11])
    numbers = np.arange(1 << 16, dtype=np.uint16).view(TYPES[dtype])
    x = np.repeat(numbers[:, None], len(scale), axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        want = (np.float32(x) * scale).astype(x.dtype)
    np.testing.assert_array_equal(np.float32(infer(x, scale)), np.float32(want))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits_is_read_and_rounded_rightly(dtype: str) -> None:
    check_conversions(dtype)


def test_nan_and_infinity_stay_in_their_channel() -> None:
    x, dy, gamma, beta = draw((130, 4, 1), "float32")
    clean = step(x, dy, gamma, beta, relu=True)
    x[100, 1], x[3, 2] = np.nan, np.inf
    have = step(x, dy, gamma, beta, relu=True)
    assert np.isnan(have.y[:, 1]).all()
    assert not np.isfinite(have.variance[1:3]).any()
    for channel in (0, 3):
        assert have.y[:, channel].tobytes() == clean.y[:, channel].tobytes()
        assert have.d_x[:, channel].tobytes() == clean.d_x[:, channel].tobytes()


@pytest.mark.parametrize("shape", [(0, 3, 1), (4, 3, 0), (1, 3, 1), (4, 0, 1)], ids=str)
def test_no_value_or_one(shape: tuple[int, ...]) -> None:
    x, dy, gamma, beta = draw(shape, "float32")
    have = step(x, dy, gamma, beta)
    assert (have.variance == 0).all()
    assert (have.d_x == 0).all()
    assert np.float32(have.y).tolist() == np.broadcast_to(np.float32(beta)[:, None], shape).tolist()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(65, 5, 1), (3, 5, 70), (1, 5, 1), (0, 5, 1)], ids=str)
def test_a_step_of_the_moving_statistics(
    shape: tuple[int, ...], dtype: str, in_place: bool, unbiased: bool
) -> None:
    x, *_ = draw(shape, dtype)
    x[:1, 1] = np.nan
    x[:1, 2] = np.inf
    wide = np.float64 if dtype == "float64" else np.float32
    old = np.random.default_rng(4).uniform(1, 2, (2, 5)).astype(wide)
    (moved, around), (kept, _) = guarded(old.shape, wide), guarded((4, 5), wide)
    moved[:] = old if in_place else 0
    given = moved if in_place else old
    before, count = old.copy(), shape[0] * shape[2]
    mean, variance, low, rstd = map(address, kept)
    call = library.Call(
        *(*shape, library.DTYPES[dtype]),
        threads=2,
        unbiased=unbiased,
        epsilon=1e-3,
        momentum=0.9,
        parallel=library.own_threads(),
        x=address(x),
        mean=mean,
        variance=variance,
        low=low,
        rstd=rstd,
        moving_mean=address(given[0]),
        moving_variance=address(given[1]),
        moved_mean=address(moved[0]),
        moved_variance=address(moved[1]),
    )
    library.run("tn_forward", call)
    assert (around[:GUARD] == 0xA5).all()
    assert (around[-GUARD:] == 0xA5).all()
    with np.errstate(invalid="ignore"):
        true = reference.forward(x, axis=1)
    factor = count / max(count - 1, 1) if unbiased else 1.0
    toward = (true.mean, true.variance * factor)
    for row, (batch, least) in enumerate(zip(toward, (1, 2), strict=True)):
        want = reference.moving(before[row], batch, 0.9) if count >= least else before[row]
        clean = [0, 3, 4]
        np.testing.assert_allclose(moved[row][clean], want[clean], rtol=2 * EPS["float32"])
        np.testing.assert_array_equal(moved[row][1:3], before[row][1:3])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kept", ["some", "few", "late", "one", "all"])
@pytest.mark.parametrize("shape", [(65, 5, 1), (8003, 37, 1)], ids=str)
def test_a_mask(shape: tuple[int, ...], kept: str, dtype: str, relu: bool) -> None:
    x, dy, gamma, beta = draw(shape, dtype, mean=10)
    rows, chance = np.arange(shape[0]), np.random.default_rng(6).random(shape[0])
    counts = chance < {"some": 0.6, "few": 0.05}.get(kept, 1)
    if kept in ("one", "late"):
        counts = rows == 40 if kept == "one" else rows > shape[0] * 0.7
    x[~counts] += 1000  # What does not count must not shift what does.
    have = step(x, dy, gamma, beta, relu=relu, mask=counts)
    true = reference.forward(x, gamma, beta, axis=1, mask=counts[:, None])
    upstream = np.float64(dy) * (true.output > 0) if relu else dy
    want = reference.backward(upstream, x, gamma, axis=1, mask=counts[:, None])
    one, wide = (64 * EPS[dtype],) * 2 if dtype == "float64" else (EPS[dtype], EPS["float32"])
    assert error(have.y, np.maximum(true.output, 0) if relu else true.output) < 2 * one
    assert error(have.mean + np.float64(have.low), true.mean) < 2 * wide
    assert error(have.variance, true.variance) < 4 * wide or kept == "one"
    size = max(np.abs(want.x).max(), np.abs(np.float64(dy)).max() * np.abs(gamma * have.rstd).max())
    assert np.abs(np.float64(have.d_x) - want.x).max() < 8 * one * size
    assert error(have.d_gamma, want.gamma) < 32 * wide
    assert error(have.d_beta, want.beta) < 32 * wide


@pytest.mark.parametrize("name", library.FUNCTIONS)
@pytest.mark.parametrize("dtype", [-1, 4, 2**31 - 1])
def test_an_unknown_dtype_is_an_error_and_nothing_is_written(name: str, dtype: int) -> None:
    x, rows = np.ones((6, 2), np.float32), np.zeros((8, 2), np.float32)
    call = library.Call(6, 2, 1, dtype, x=address(x), dy=address(x), y=address(rows))
    places = ("mean", "variance", "low", "rstd", "dgamma", "dbeta")
    call = call._replace(**dict(zip(places, map(address, rows), strict=False)))
    message = f"the compiled passes of BatchNormalization have no dtype {dtype}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        library.run(name, call)
    assert not rows.any()


@pytest.mark.parametrize("name", library.FUNCTIONS)
def test_more_channels_than_memory_is_an_error(name: str) -> None:
    with pytest.raises(MemoryError, match=r"^no memory for the sums of BatchNormalization$"):
        library.run(name, library.Call(outer=1, channels=1 << 45, inner=1, dtype=0))


def test_without_threads_to_call_one_does_all() -> None:
    drawn = draw((8003, 37, 1), "float32")
    with mock.patch.object(library, "own_threads", return_value=0):
        alone = step(*drawn, threads=8)
    assert alone.d_x.tobytes() == step(*drawn, threads=8).d_x.tobytes()


def run_apart(program: str, **environment: str) -> str:
    """What a program prints that has the names of this module."""
    names = "import sys; sys.path[:0] = ['tests', 'tests/kernels']; from test_library import *\n"
    line = [sys.executable, "-W", "ignore", "-c", names + program]
    environment = {**os.environ, **environment}
    found = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the processor")
def test_the_code_for_any_processor_gives_the_oracles_numbers() -> None:
    program = (
        "for shape in SHAPES:\n"
        "    for dtype in TYPES:\n"
        "        for relu in (False, True):\n"
        "            test_a_step_is_the_oracles(shape, dtype, relu)\n"
        "for dtype in ('float16', 'bfloat16'):\n"
        "    check_conversions(dtype)\n"
        "print(step(*draw((300, 600, 1), 'float32')).d_x.tobytes().hex())\n"
    )
    plain = run_apart(program, TRUENORM_LEVEL="v1")
    has_more = {"avx2", "fma", "f16c"} <= set(Path("/proc/cpuinfo").read_text().split())
    uses_more = has_more and os.environ.get("TRUENORM_LEVEL") != "v1"
    here = step(*draw((300, 600, 1), "float32")).d_x.tobytes().hex()
    assert (plain != here) == uses_more


@pytest.mark.long
def test_avx_512_gives_the_bits_of_avx2() -> None:
    program = (
        "import hashlib; bits = hashlib.sha256()\n"
        "for shape in SHAPES:\n"
        "    for dtype in TYPES:\n"
        "        have = step(*draw(shape, dtype), relu=True)\n"
        "        for name in Step.__dataclass_fields__:\n"
        "            bits.update(getattr(have, name).tobytes())\n"
        "print(bits.hexdigest())\n"
    )
    assert run_apart(program, TRUENORM_LEVEL="v3") == run_apart(program, TRUENORM_LEVEL="v4")


def test_a_forked_child_has_threads_of_its_own() -> None:
    program = (
        "drawn = draw((8003, 37, 1), 'float32'); before = step(*drawn).y.tobytes()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if step(*drawn).y.tobytes() == before else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert run_apart(program) == "0"
