"""PyTorch: what collecting statistics needs of it. See :mod:`truenorm._kernels.sums`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed

from truenorm._errors import DistributedError
from truenorm._kernels.contract import Tensor, Vector
from truenorm._kernels.torch import native, passes

GROUP = 32
BLOCK = 2**18
"""Values per step on a CPU: the deviations stay in the cache, which is half the time."""
FEW = 2048
"""Up to so many rows ``centred_sums`` is float64; of more, float32's rounding averages out."""


def compiled_sums(rows: Tensor) -> Tensor | None:
    """The same of all rows about their mean, by the compiled pass; None where it is not there."""
    if rows.device.type != "cpu" or not passes.takes(rows):
        return None
    if rows.requires_grad and torch.is_grad_enabled():  # a model that differentiates in its call
        mean = rows.mean(0, dtype=torch.float64)
        return torch.stack([mean, torch.zeros_like(mean), (rows - mean).square().sum(0)])
    count, channels = rows.shape
    plan = passes.Plan((count, channels, 1), channel=1, epsilon=0.0, relu=False)
    found = torch.zeros(3, channels, dtype=torch.float64)
    found[::2] = native.moments(plan, rows.detach().contiguous(), None, exact=True)
    found[2] *= count
    return found


def centred_sums(rows: Tensor, shift: Vector) -> Tensor:
    """Shift, sum and sum of squares of ``rows - shift`` per column, float64, as one array."""
    found = compiled_sums(rows) if len(rows) > FEW else None
    if found is not None:  # rows that a mask excludes are in it, too: about the shift they are 0
        apart = found[0] - shift
        return torch.stack(
            [found[0] - apart, apart * len(rows), found[2] + apart.square() * len(rows)]
        )
    channels = max(rows.shape[1], 1)
    shift = shift.to(torch.float64) if len(rows) <= FEW else shift
    size = max(BLOCK // channels, GROUP) if rows.device.type == "cpu" else max(len(rows), 1)
    size = -(-size // GROUP) * GROUP
    space = torch.empty(
        (min(size, len(rows)), rows.shape[1]), dtype=shift.dtype, device=rows.device
    )
    first, second = torch.zeros(2, rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        deviations = torch.sub(block, shift, out=space[: len(block)])
        first += _total(deviations)
        second += _total(deviations.square_())
    return torch.stack([shift.to(torch.float64), first, second])


def _total(values: Tensor) -> Vector:
    whole = len(values) // GROUP * GROUP
    groups = values[:whole].reshape(-1, GROUP, values.shape[1]).sum(1)
    return groups.sum(0, dtype=torch.float64) + values[whole:].sum(0, dtype=torch.float64)


def joined(
    parts: Sequence[tuple[Vector, Tensor]], counts: np.ndarray[Any, Any] | None = None
) -> Tensor:
    """Counts and sums of all calls side by side, shape (4, channels of all calls).

    ``counts`` is their row where it is known beforehand: a number for each channel of each call.
    """
    if not parts:
        return torch.zeros((4, 0), dtype=torch.float64)
    sums = torch.cat([sums for _, sums in parts], dim=1)
    if counts is None:
        rows = [torch.as_tensor(n, device=s.device).expand(s.shape[1:]) for n, s in parts]
        return torch.cat([torch.cat(rows).to(sums)[None], sums])
    return torch.cat([torch.as_tensor(counts, device=sums.device)[None], sums])


def compiled(function: Callable[..., Any], jit: bool) -> Callable[..., Any]:
    """The function without gradients: PyTorch runs it as it is."""
    del jit
    return torch.no_grad()(function)


def anew(function: Any) -> Callable[..., Any] | None:
    """None: what ``torch.compile`` made notices by itself that a method is another one."""
    del function


def program() -> Any:
    """PyTorch runs what it comes by: nothing is traced."""
    return None


def tell(function: Callable[[np.ndarray[Any, Any]], None], value: Any) -> None:
    """Hand numbers to a Python function."""
    function(value.cpu().numpy())


def told() -> None:
    """It has been at once."""


def is_mapped(x: Any) -> bool:
    """Inside ``torch.vmap`` a tensor has no memory of its own to point to."""
    try:
        x.data_ptr()
    except RuntimeError:
        return True
    return False


def processes() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather(vector: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """The float64 vectors of all processes; every process must call it."""
    device = "cuda" if "nccl" in distributed.get_backend() else "cpu"
    own = torch.from_numpy(vector).to(device)
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    try:
        distributed.all_gather(parts, own)
    except RuntimeError as error:
        raise DistributedError(
            "Another process did not take part in the exchange of statistics",
            expected="processes that do the same, equally often and in one order",
            received=str(error).partition("\n")[0].partition(". ")[0],
            remedy="look at what the other processes say; how long they are waited for is the "
            "timeout= of torch.distributed.init_process_group",
        ) from error
    return [part.cpu().numpy() for part in parts]
