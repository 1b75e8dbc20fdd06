"""What a step must not do where the input is on a GPU: wait for it.

A processor stands in for the GPU: the passes of a GPU (Triton's, interpreted) or the composite run,
and each of PyTorch's operations that would wait for numbers of a GPU is refused.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest

import truenorm as tn

if keras.config.backend() != "torch":
    pytest.skip("about PyTorch", allow_module_level=True)

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,  # item(), bool(), float(), a condition
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.repeat_interleave,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "relu": {"activation": "relu"},
    "cumulative": {"momentum": None},
    "bessel": {"bessel_correction": True},
    "renorm": {"renorm": True},
    "ghosts": {"virtual_batch_size": 4},
    "accumulation": {"accumulation_steps": 2},
    "domains": {"domains": 2},
    "synchronized": {"synchronized": True},
    "frozen statistics": {"freeze": "statistics"},
    "frozen affine": {"freeze": "affine"},
    "half": {"dtype": "mixed_bfloat16"},
}
X = np.random.default_rng(0).normal(3, 2, (8, 3, 5)).astype("float32")


CHOOSING = {aten.index, aten.index_put, aten.index_put_}  # x[mask]
COPYING = ("tolist", "numpy", "cpu", "__array__")  # no operations, on a processor


def _is_choice(index: Any) -> bool:
    return index is not None and index.dtype == torch.bool


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chooses = func.overloadpacket in CHOOSING and any(_is_choice(one) for one in args[1])
        assert not chooses, f"{func} by booleans waits for the GPU"
        assert func.overloadpacket not in WAITING, f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    refused = mock.Mock(side_effect=AssertionError("it waits for the GPU"))
    with contextlib.ExitStack() as stack:
        for name in COPYING:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refused))
        stack.enter_context(NoWaiting())
        yield


@contextlib.contextmanager
def as_on_a_gpu(kernel: str) -> Iterator[None]:
    """The kernel of a GPU, and nothing waits."""
    with contextlib.ExitStack() as stack:
        if kernel == "triton":
            passes = importlib.import_module("truenorm._kernels.torch.passes")
            triton = importlib.import_module("truenorm._kernels.torch.triton_passes")
            stack.enter_context(mock.patch.object(passes, "_passes", return_value=triton))
            # Or else who watches the operations, as here, gets the composite.
            stack.enter_context(mock.patch.object(passes, "watched", return_value=False))
        stack.enter_context(no_waiting())
        yield


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: float(x.mean()),
        lambda x: x.tolist(),
        lambda x: np.asarray(x),
    ],
)
def test_what_waits_is_seen(waits: Callable[[Any], Any]) -> None:
    with no_waiting(), pytest.raises(AssertionError, match="waits for the GPU"):
        waits(torch.tensor(X))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kernel", ["composite", "triton"])
def test_no_step_waits_for_the_gpu(kernel: str, option: str, masked: bool) -> None:
    if kernel == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    layer = tn.BatchNormalization(**OPTIONS[option])
    layer.build(X.shape)
    x = torch.tensor(X, requires_grad=True)
    mask = torch.tensor(np.arange(24).reshape(8, 3) % 5 > 0) if masked else None
    with as_on_a_gpu(kernel):
        output = layer(x, training=True, mask=mask)
        output.backward(torch.ones_like(output))
        with torch.no_grad():
            layer(x, training=False, mask=mask)
    assert bool(torch.isfinite(x.grad).all())
