"""PyTorch on a processor: the compiled passes. See ``passes.py``."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from truenorm._kernels import library
from truenorm._kernels.contract import Moving, Tensor, Vector

if TYPE_CHECKING:
    from truenorm._kernels.torch.passes import Layout, Plan

CODES = {getattr(torch, name): code for name, code in library.DTYPES.items()}
DTYPES = tuple(CODES)
MASKS = True


def forward(
    plan: Plan,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: Tensor | None,
    rows: Tensor,
    moving: Moving | None,
) -> Tensor:
    """The output; the statistics are written to ``rows``."""
    output = torch.empty_like(x)
    mean, variance, low, rstd, *moved = _addresses(rows)
    moving = moving or Moving(None, None)
    moved_mean, moved_variance = (0, 0) if moving.momentum is None else moved
    call = library.Call(
        *(*plan.layout, CODES[x.dtype]),
        relu=plan.relu,
        threads=torch.get_num_threads(),
        unbiased=moving.unbiased,
        epsilon=plan.epsilon,
        momentum=moving.momentum or 0.0,
        parallel=_parallel(),
        x=_address(x),
        gamma=_address(gamma),
        beta=_address(beta),
        mean=mean,
        variance=variance,
        low=low,
        rstd=rstd,
        y=_address(output),
        moving_mean=_address(moving.mean),
        moving_variance=_address(moving.variance),
        moved_mean=moved_mean,
        moved_variance=moved_variance,
        mask=_address(mask),
    )
    library.run("tn_forward", call)
    return output


def backward(
    plan: Plan,
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: Tensor | None,
    rows: Tensor,
    needed: bool,
) -> tuple[Tensor | None, Vector, Vector]:
    """The gradients of x, if needed, gamma and beta."""
    d_x = torch.empty_like(x) if needed else None
    d_gamma, d_beta = rows.new_empty(plan.layout[1]), rows.new_empty(plan.layout[1])
    mean, _, low, rstd = _addresses(rows)[:4]
    call = library.Call(
        *(*plan.layout, CODES[x.dtype]),
        relu=plan.relu,
        threads=torch.get_num_threads(),
        parallel=_parallel(),
        x=_address(x),
        dy=_address(gradient),
        gamma=_address(gamma),
        beta=_address(beta),
        mean=mean,
        low=low,
        rstd=rstd,
        dgamma=_address(d_gamma),
        dbeta=_address(d_beta),
        y=_address(d_x),
        mask=_address(mask),
    )
    library.run("tn_backward", call)
    return d_x, d_gamma, d_beta


def infer(
    layout: Layout,
    epsilon: float,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mean: Vector,
    variance: Vector,
) -> Tensor:
    """Normalise with statistics that are given."""
    output = torch.empty_like(x)
    call = library.Call(
        *(*layout, CODES[x.dtype]),
        threads=torch.get_num_threads(),
        epsilon=epsilon,
        parallel=_parallel(),
        x=_address(x),
        gamma=_address(gamma),
        beta=_address(beta),
        mean=_address(mean),
        variance=_address(variance),
        y=_address(output),
    )
    library.run("tn_infer", call)
    return output


def _address(tensor: Any) -> int:
    """That of a tensor's memory; 0 for None."""
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if address == 0 and tensor.numel() > 0:
        raise RuntimeError("a tensor of BatchNormalization has no memory")
    return address


def _addresses(rows: Tensor) -> range:
    """Those of the rows of a contiguous matrix."""
    start, step = rows.data_ptr(), rows.stride(0) * rows.element_size()
    return range(start, start + step * rows.shape[0], step)


@cache
def _parallel() -> int:
    """PyTorch's own threads, which are OpenMP's: others would compete with them."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except AttributeError:
        return library.own_threads()
