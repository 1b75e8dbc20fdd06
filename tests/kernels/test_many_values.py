"""Sums of very many values lose no digits, on any path: eager, in a graph, compiled or not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from layer_cases import array, error, gradients, tensor

from truenorm import _kernels as kernels
from truenorm._kernels import composite, reference
from truenorm._kernels.contract import Options
from truenorm._kernels.sums import batch_sums

BACKEND = keras.config.backend()
PASSES = importlib.import_module(
    f"truenorm._kernels.{BACKEND}.{'passes' if BACKEND == 'torch' else 'native'}"
)
WIDE = 2.0**-23
PATHS = {
    "jax": ["eager", "graph"],
    "tensorflow": ["eager", "graph", "any_size", "xla"],
    "torch": ["eager"],
}[BACKEND]
SHAPES = [(10_007, 3), (1_000_003, 1), (1_000_003, 3), (1009, 3, 997)]  # primes
OPTIONS = Options(-1, 1e-3)


def on_path(path: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The function as this path runs it."""
    if path == "eager":
        return call
    if BACKEND == "jax":
        import jax

        return jax.jit(call)
    import tensorflow as tf

    if path == "any_size":
        return lambda x, *others: tf.function(
            call,
            input_signature=[
                tf.TensorSpec((None, *x.shape[1:]), x.dtype),
                *(tf.TensorSpec((None, *o.shape[1:]), o.dtype) for o in others),
            ],
        )(x, *others)
    return tf.function(call, jit_compile=path == "xla")


@pytest.fixture(params=["compiled", "uncompiled", "composite"])
def normalize(request: pytest.FixtureRequest) -> Any:
    if request.param == "composite":
        yield composite.normalize
    elif request.param == "compiled":
        yield kernels.normalize
    else:
        with mock.patch.object(PASSES, "takes", return_value=False):
            yield kernels.normalize


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(normalize: Any, path: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(50, 2, shape).astype("float32")
    options = OPTIONS._replace(axis=1)
    found = on_path(path, lambda x: normalize(x, None, None, options)[:3])(tensor(x))
    true = reference.forward(x, axis=1)
    assert error(array(found[0]), true.output) < 4 * WIDE
    assert np.abs(array(found[1]) - true.mean).max() < 50 * WIDE
    assert error(array(found[2]), true.variance) < 8 * WIDE


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("apart", [16, 17, 64])
def test_rows_that_are_unlike_all_others(normalize: Any, path: str, apart: int) -> None:
    """A number to shift by that is the mean of a few rows is far from that of all."""
    x = np.random.default_rng(0).normal(50, 2, (10_007, 3)).astype("float32")
    x[::apart] += 1e4
    found = on_path(path, lambda x: normalize(x, None, None, OPTIONS)[:3])(tensor(x))
    true = reference.forward(x)
    assert error(array(found[0]), true.output) < 4 * WIDE
    assert np.abs(array(found[1]) - true.mean).max() < 4 * WIDE * np.sqrt(true.variance).max()
    assert error(array(found[2]), true.variance) < 8 * WIDE


@pytest.mark.parametrize("path", PATHS)
def test_gradients(normalize: Any, path: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(5, 2, (1_000_003, 3)).astype("float32")
    dy = (x + rng.normal(50, 2, x.shape)).astype("float32")
    one = tensor(np.ones(3))

    def step(x: Any, dy: Any) -> Any:
        return gradients(
            lambda x, gamma, beta: normalize(x, gamma, beta, OPTIONS).output, (x, one, 0 * one), dy
        )[1]

    d_x, d_gamma, d_beta = on_path(path, step)(tensor(x), tensor(dy))
    true = reference.backward(dy, x)
    assert np.abs(array(d_x) - true.x).max() < 8 * WIDE * dy.max()
    assert error(array(d_gamma), true.gamma) < 50 * WIDE
    assert error(array(d_beta), true.beta) < 8 * WIDE


@pytest.mark.long
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hundred_million(normalize: Any, path: str, dtype: str) -> None:
    count = 100_000_007
    x = np.random.default_rng(0).standard_normal(count, "float32")
    x = keras.ops.cast(tensor((2 * x + 50)[:, None]), dtype)
    parts = np.array_split(array(x)[:, 0], 64)
    mean = sum(part.sum(dtype="float64") for part in parts) / count
    variance = sum(np.square(np.float64(part) - mean).sum() for part in parts) / count
    found = on_path(path, lambda x: normalize(x, None, None, OPTIONS)[1:3])(x)
    assert abs(float(found[0][0]) - mean) < 50 * WIDE
    assert abs(float(found[1][0]) / variance - 1) < 8 * WIDE


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA compiles for each size")
def test_new_sizes_compile_nothing() -> None:
    import tensorflow as tf

    with (
        mock.patch.object(PASSES, "takes", return_value=False),
        mock.patch.object(tf, "function", side_effect=AssertionError("a program was made")),
    ):
        for size in range(100, 160):
            x = np.random.default_rng(size).normal(3, 2, (size, 3)).astype("float32")
            found = kernels.normalize(tensor(x), None, None, OPTIONS)
            assert error(array(found.output), reference.forward(x).output) < 1e-6


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("axis", "masked"), [(-1, False), (1, False), (-1, True)])
def test_the_sums_of_a_batch_have_its_moments_however_large_its_mean(
    axis: int, *, masked: bool, compiled: bool
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(1e4, 1.0, (40_009, 5)).astype("float32")
    x[:, 1] = 3.0
    given = tensor(x if axis == -1 else np.ascontiguousarray(x[:40_000].reshape(-1, 5, 8)))
    wide = array(given).astype(np.float64)
    wide = wide if axis == -1 else np.moveaxis(wide, 1, -1).reshape(-1, 5)
    mask = rng.random(len(x)) < 0.1 if masked else None
    wide = wide if mask is None else wide[mask]
    with mock.patch.object(PASSES, "takes", PASSES.takes if compiled else lambda *_: False):
        count, sums = batch_sums(given, axis=axis, mask=None if mask is None else tensor(mask))
    shift, first, second = array(sums)
    mean = shift + first / int(count)
    variance = (second - first**2 / int(count)) / int(count)
    assert int(count) == len(wide)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=0, atol=1e-7 * wide.std(0).max())
    np.testing.assert_allclose(variance, wide.var(0), rtol=4e-7, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_compiled_sums_have_the_digits_of_float64(axis: int, dtype: str) -> None:
    x = np.random.default_rng(0).normal(50.0, 1.0, (5009, 3, 7) if axis == 1 else (40_009, 3))
    given = keras.ops.cast(tensor(x.astype("float32")), dtype)
    if not PASSES.takes(given):
        pytest.skip("there are no compiled passes here")
    true = reference.forward(array(given), axis=axis)
    count, sums = batch_sums(given, axis=axis)
    mean, nothing, squares = array(sums)
    assert not nothing.any()
    np.testing.assert_allclose(mean, true.mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(squares / int(count), true.variance, rtol=1e-12)
