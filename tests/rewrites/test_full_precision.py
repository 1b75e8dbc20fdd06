"""The proof of a rewrite on a GPU, which takes TensorFloat-32 for products if it is not told."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any
from unittest import mock

import keras
import pytest
from small_models import dense, shake

import truenorm as tn
from truenorm._kernels import run_time

BACKEND = keras.config.backend()
MATMUL = keras.ops.matmul


def is_coarse() -> bool:
    """Whether a GPU would take TensorFloat-32 now, as each framework says it."""
    framework: Any = importlib.import_module(BACKEND)
    if BACKEND == "torch":
        return framework.backends.cudnn.conv.fp32_precision == "tf32"
    if BACKEND == "jax":
        return framework.config.jax_default_matmul_precision is None
    return framework.config.experimental.tensor_float_32_execution_enabled()


def rounded(x: Any) -> Any:
    """With 10 bits behind the point, as a GPU reads what it multiplies (Veltkamp, 1968)."""
    large = 8193.0 * x
    return large - (large - x)


def as_a_gpu(x: Any, y: Any) -> Any:
    return MATMUL(rounded(x), rounded(y)) if is_coarse() else MATMUL(x, y)


@pytest.fixture
def gpu() -> Iterator[None]:
    dense_layer = importlib.import_module("keras.src.layers.core.dense")
    with mock.patch.object(dense_layer.ops, "matmul", as_a_gpu):
        yield


@pytest.mark.usefixtures("gpu")
def test_a_fold_is_proven_where_products_are_coarse() -> None:
    assert is_coarse()
    folded = tn.fold(shake(dense()))
    assert folded.max_site_error < 1e-5
    assert is_coarse()


@pytest.mark.usefixtures("gpu")
def test_without_it_the_rounding_looks_like_a_fault() -> None:
    with (
        mock.patch.object(run_time, "full_precision", nullcontext),
        pytest.raises(tn.VerificationError),
    ):
        tn.fold(shake(dense()))


def test_the_setting_comes_back_after_an_error() -> None:
    with suppress(KeyError), run_time.full_precision():
        assert not is_coarse()
        raise KeyError
    assert is_coarse()
