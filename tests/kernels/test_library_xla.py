"""The passes as calls of XLA's: numbers, errors, and an XLA of another interface refused."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import ml_dtypes
import numpy as np
import pytest
import xla_frames
from layer_cases import EPSILON, array, error, tensor
from xla_frames import Xla, XlaError

from truenorm import _kernels as kernels
from truenorm._kernels import library, reference

TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
NAMES = ("mean", "low", "variance")
KEPT: list[Any] = []  # functions whose addresses XLA keeps as long as the process lives


def function(name: str = "tn_xla_moments") -> Any:
    """A function pointer of its own: what a test sets on it does not reach other tests."""
    address = ctypes.cast(getattr(library.loaded(), name), ctypes.c_void_p).value
    return ctypes.CFUNCTYPE(None)(address)


def moments(xla: Xla, x: np.ndarray, *mask: np.ndarray) -> dict[str, np.ndarray]:
    wide = np.float64 if x.dtype == np.float64 else np.float32
    rows = np.full((3, x.shape[1]), 77, wide)
    xla.call([xla.buffer(a) for a in (x, *mask)], [xla.buffer(row) for row in rows])
    return dict(zip(NAMES, rows, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(70, 5), (4, 5, 9), (8003, 37)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_the_oracles(shape: tuple[int, ...], dtype: str, masked: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, shape).astype(TYPES[dtype])
    masked = masked and len(shape) == 2
    mask = rng.random(shape[0]) < 0.5
    have = moments(Xla(function()), x, *[mask] * masked)
    true = reference.forward(x, axis=1, mask=mask if masked else None)
    # Sums of float64 have no wider type to be joined in.
    wide = 2.0**-46 if dtype == "float64" else 2.0**-23
    assert error(have["mean"] + np.float64(have["low"]), true.mean) < 2 * wide
    assert error(have["variance"], true.variance) < 4 * wide


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(70, 5), (4, 5, 9), (8003, 37)], ids=str)
def test_products_are_the_oracles(shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(mean, 2, shape).astype(TYPES[dtype]) for mean in (3, 0))
    found = moments(Xla(function()), x)
    wide = found["mean"].dtype
    rstd = (1 / np.sqrt(found["variance"] + EPSILON)).astype(wide)
    arrays = [x, dy, found["mean"], found["low"], rstd]
    rows = np.full((2, shape[1]), 77, wide)
    xla = Xla(function("tn_xla_products"))
    xla.call([xla.buffer(a) for a in arrays], [xla.buffer(row) for row in rows])
    want = reference.backward(dy, x, np.ones(shape[1]), axis=1, epsilon=EPSILON)
    most = np.abs(np.float64(dy)).sum(tuple(a for a in range(len(shape)) if a != 1)).max()
    eps = 2.0**-46 if dtype == "float64" else 2.0**-21
    for have, exact in zip(rows, (want.gamma, want.beta), strict=True):
        assert np.abs(have - exact).max() < eps * most


def test_ghost_batches_have_moments_and_products_of_their_own() -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, (2, 8, 3, 10, 5)).astype(np.float32)  # (outer, groups, run, width)
    mean, low, variance, d_gamma, d_beta = rows = np.full((5, 15), 77, np.float32)
    one, other = Xla(function()), Xla(function("tn_xla_products"))
    one.call([one.buffer(x)], [one.buffer(row) for row in rows[:3]])
    rstd = 1 / np.sqrt(variance + np.float32(EPSILON))
    given = [other.buffer(a) for a in (x, dy, mean, low, rstd)]
    other.call(given, [other.buffer(row) for row in (d_gamma, d_beta)])
    for g in range(3):
        mine = slice(5 * g, 5 * g + 5)
        true = reference.forward(x[:, g], axis=-1)
        want = reference.backward(dy[:, g], x[:, g], np.ones(5), axis=-1, epsilon=EPSILON)
        assert error(mean[mine] + np.float64(low[mine]), true.mean) < 2.0**-22
        assert error(variance[mine], true.variance) < 2.0**-21
        assert error(d_gamma[mine], want.gamma) < 1e-5
        assert error(d_beta[mine], want.beta) < 1e-6


@pytest.mark.parametrize(
    ("theirs", "answer"),
    [
        ((0, 1), (0, 1)),
        ((0, 3), (0, 3)),
        ((0, 4), (0, 3)),  # XLA knows whether it still takes that
        ((0, 0), (-1, -1)),
        ((1, 0), (-1, -1)),
    ],
)
def test_it_says_which_version_it_was_made_for(
    theirs: tuple[int, int], answer: tuple[int, int]
) -> None:
    assert Xla(function(), *theirs).register() == answer


def test_an_xla_that_does_not_say_its_version_is_the_oldest() -> None:
    """Up to JAX 0.8, whose version is 0.1."""
    xla = Xla(function())
    xla.api = None
    assert xla.register() == (0, 1)


def test_a_smaller_struct_is_refused() -> None:
    for of, field in (("frame", "rets"), ("api", "create_error")):
        xla = Xla(function())
        if of == "frame":
            xla.frame_size = getattr(xla_frames.Frame, field).offset
        else:
            xla.api.struct_size = getattr(xla_frames.Api, field).offset
        assert xla.register() == (-1, -1)


def test_what_it_cannot_do_is_an_error_of_xla() -> None:
    xla = Xla(function())
    x, rows = np.ones((6, 2), np.float32), np.zeros((3, 2), np.float32)
    result = [xla.buffer(row) for row in rows]
    small = xla.buffer(x)
    small.struct_size -= 1
    unexpected = r"\(3, 'BatchNormalization: unexpected arguments'\)"
    for arguments in (
        [],
        [xla.buffer(x)] * 3,
        [small],
        [xla.buffer(x[0])],
        [xla.buffer(x[..., None, None, None])],
        [xla.buffer(x[..., None]), xla.buffer(np.ones(6, bool))],
    ):
        with pytest.raises(XlaError, match=unexpected):
            xla.call(arguments, result)
    with pytest.raises(XlaError, match=unexpected):
        xla.call([xla.buffer(x)], [])
    products = Xla(function("tn_xla_products"))
    with pytest.raises(XlaError, match=unexpected):
        products.call([products.buffer(x)] * 4, result[:2])
    with pytest.raises(XlaError, match=r"\(3, 'BatchNormalization: unexpected dtype'\)"):
        xla.call([xla.buffer(x.astype(np.int32))], result)
    with pytest.raises(XlaError, match=r"\(8, 'BatchNormalization: no memory for its sums'\)"):
        xla.call([xla.buffer(x, (1, 1 << 45))], result)
    assert not rows.any()


def test_it_does_nothing_before_xla_executes() -> None:
    xla = Xla(function())
    rows = np.zeros((3, 2), np.float32)
    result = [xla.buffer(row) for row in rows]
    for stage in range(3):
        xla.call([xla.buffer(np.ones((6, 2), np.float32))], result, stage=stage)
    assert not rows.any()


@pytest.mark.other_packages
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler")
def test_the_structs_are_those_of_the_installed_jax() -> None:
    (jaxlib,) = importlib.util.find_spec("jaxlib").submodule_search_locations
    folders = (library.PATH.parent, Path(jaxlib, "include"))
    source = Path(__file__).with_name("xla_layout.c")
    compiler = os.environ.get("CC", "cc")
    line = [compiler, "-std=c11", "-fsyntax-only", *(f"-I{folder}" for folder in folders)]
    found = subprocess.run([*line, str(source)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def disguised(change: Any) -> Any:
    """The function, behind one that changes what XLA tells when it registers it."""
    own = function()
    own.restype, own.argtypes = ctypes.c_void_p, (ctypes.POINTER(xla_frames.Frame),)

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(xla_frames.Frame))
    def handler(frame: Any) -> Any:
        if frame.contents.extensions:
            copy = xla_frames.Frame.from_buffer_copy(frame.contents)
            api = xla_frames.Api.from_buffer_copy(copy.api.contents)
            copy.api = ctypes.pointer(api)
            change(copy)
            return own(ctypes.pointer(copy))
        return own(frame)

    KEPT.append(handler)
    return handler


def _is_larger(frame: xla_frames.Frame) -> None:
    frame.struct_size += 64
    frame.api.contents.struct_size += 64


def _is_smaller(frame: xla_frames.Frame) -> None:
    frame.struct_size = xla_frames.Frame.rets.offset


def _is_version_one(frame: xla_frames.Frame) -> None:
    frame.api.contents.version.major = 1


@pytest.mark.skipif(keras.config.backend() != "jax", reason="XLA calls it on JAX alone")
@pytest.mark.parametrize("change", [_is_larger, _is_smaller, _is_version_one])
def test_with_another_xla_jax_does_without_it(change: Any) -> None:
    from truenorm._kernels.jax import native

    disguise = disguised(change)
    fake = mock.Mock(tn_xla_moments=disguise, tn_xla_products=disguise)
    x = np.random.default_rng(0).normal(5, 2, (40, 3))
    registered = functools.cache(native._registered.__wrapped__)
    with (
        mock.patch.object(native, "TARGET", f"truenorm_test{change.__name__}"),
        mock.patch.object(native, "_registered", registered),
        mock.patch.object(library, "loaded", return_value=fake),
    ):
        assert registered() == (change is _is_larger)
        result = kernels.normalize(tensor(x), None, None, kernels.Options(-1, EPSILON))
    true = reference.forward(np.float32(x), axis=-1)
    assert error(array(result.output), true.output) < 4e-7
    assert error(array(result.variance), true.variance) < 4e-7
