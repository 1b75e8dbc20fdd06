"""PyTorch: what happens when a computation runs. See :mod:`truenorm._kernels.run_time`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils import _python_dispatch

_ALONE = threading.RLock()
"""Settings are the process's: two threads that change them would put back each other's."""

PRODUCTS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.rnn,  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.mkldnn.matmul,  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.mkldnn.conv,  # pyright: ignore[reportAttributeAccessIssue]
)
"""The kinds of operations whose precision can be set."""


def when_run(receive: Callable[[], None], tensor: Any) -> None:
    """At once."""
    del tensor
    receive()


def tell(receive: Callable[[dict[str, Any]], None], tensors: Mapping[str, Any]) -> bool:
    """At once; not of tensors inside ``torch.vmap``, which have no numbers of their own."""
    try:
        found = {name: None if t is None else _numbers(t) for name, t in tensors.items()}
    except RuntimeError:
        return False
    receive(found)
    return True


def _numbers(tensor: Any) -> np.ndarray[Any, Any]:
    return tensor.detach().to("cpu", torch.float64).numpy()


def settle() -> None:
    """All is told at once."""


def place() -> None:
    """A value is one everywhere."""


def is_now() -> bool:
    """Unless PyTorch makes a program of it."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # pyright: ignore[reportPrivateImportUsage]


def is_value(tensor: Any) -> bool:
    """A value is one everywhere."""
    del tensor
    return True


def numbers(tensor: Any) -> np.ndarray[Any, Any] | None:
    """Those in this memory; from a GPU they would have to be waited for."""
    return tensor.numpy() if type(tensor) is torch.Tensor and tensor.is_cpu else None


def constants() -> AbstractContextManager[None]:
    """Outside of modes in which tensors have no numbers, if this PyTorch lets anybody out."""
    leave: Any = getattr(_python_dispatch, "_disable_current_modes", None)
    return leave() if leave is not None and is_now() else nullcontext()


def repeats() -> bool:
    """Whether this runs inside a backward pass, as both modes of ``torch.utils.checkpoint`` do."""
    if torch.compiler.is_compiling():  # pyright: ignore[reportPrivateImportUsage]
        return False
    try:
        return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
    except AttributeError:  # another version of PyTorch
        return False


@contextmanager
def full_precision() -> Generator[None]:
    """A setting for each kind of product."""
    with _ALONE:
        before = [kind.fp32_precision for kind in PRODUCTS]
        try:
            for kind in PRODUCTS:
                kind.fp32_precision = "ieee"
            yield
        finally:
            for kind, precision in zip(PRODUCTS, before, strict=True):
                kind.fp32_precision = "none"  # what it inherits
                if kind.fp32_precision != precision:
                    kind.fp32_precision = precision
