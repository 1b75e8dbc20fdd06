"""PyTorch on a processor: the compiled passes. See ``passes.py``.

And halves of them, for a part of a batch. See ``synchronized.py``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from truenorm._kernels import library
from truenorm._kernels.contract import Moving, Tensor, Vector

if TYPE_CHECKING:
    from truenorm._kernels.torch.passes import Plan

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
    add: Tensor | None = None,
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
        add=_address(add),
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
    output: Tensor | None = None,
    behind: Tensor | None = None,
) -> tuple[Tensor | None, Vector, Vector]:
    """The gradients of x, if needed, gamma and beta.

    With an output, its signs are those of the ReLU, and the gradient that goes through it is
    written to ``behind``.
    """
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
        out=_address(output),
        dadd=_address(behind),
    )
    library.run("tn_backward", call)
    return d_x, d_gamma, d_beta


def infer(
    plan: Plan,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mean: Vector,
    variance: Vector,
    add: Tensor | None,
) -> Tensor:
    """Normalise with statistics that are given."""
    output = torch.empty_like(x)
    call = library.Call(
        *(*plan.layout, CODES[x.dtype]),
        relu=plan.relu,
        threads=torch.get_num_threads(),
        epsilon=plan.epsilon,
        parallel=_parallel(),
        x=_address(x),
        gamma=_address(gamma),
        beta=_address(beta),
        mean=_address(mean),
        variance=_address(variance),
        y=_address(output),
        add=_address(add),
    )
    library.run("tn_infer", call)
    return output


def moments(plan: Plan, x: Tensor, mask: Tensor | None, *, exact: bool = False) -> Tensor:
    """Mean and variance of a part of a batch, in float64; ``exact``: computed in it, too."""
    wide = torch.float64 if exact or x.dtype == torch.float64 else torch.float32
    rows = torch.empty(4, plan.layout[1], dtype=wide, device="cpu")
    _half("tn_forward", plan, x, mask, rows)
    found = rows[:2].to(torch.float64)
    found[0] += rows[2]
    return found


def normalize(
    plan: Plan, x: Tensor, gamma: Vector | None, beta: Vector | None, rows: Tensor
) -> Tensor:
    """The output for a part of a batch, whose statistics are in ``rows``."""
    output = torch.empty_like(x)
    _half("tn_normalize", plan, x, None, rows, gamma=gamma, beta=beta, y=output)
    return output


def products(
    plan: Plan,
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    rows: Tensor,
) -> Tensor:
    """The gradients of gamma and beta from a part of a batch, as two rows."""
    found = torch.empty(2, plan.layout[1], dtype=rows.dtype, device="cpu")
    given = {"dy": gradient, "gamma": gamma, "beta": beta, "dgamma": found[0], "dbeta": found[1]}
    _half("tn_backward", plan, x, None, rows, **given)
    return found


def gradient(
    plan: Plan,
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: Tensor | None,
    rows: Tensor,
    means: Tensor,
) -> Tensor:
    """The gradient of x, from those of gamma and beta of the whole batch by its count."""
    d_x = torch.empty_like(x)
    given = {"dy": gradient, "gamma": gamma, "beta": beta, "dgamma": means[0], "dbeta": means[1]}
    _half("tn_gradient", plan, x, mask, rows, **given, y=d_x)
    return d_x


def _half(
    name: str, plan: Plan, x: Tensor, mask: Tensor | None, rows: Tensor, **given: Tensor | None
) -> None:
    """One half of the forward or backward pass, in the rows' dtype."""
    mean, variance, low, rstd = _addresses(rows)[:4]
    wide = library.WIDE if rows.dtype == torch.float64 != x.dtype else 0
    call = library.Call(
        *(*plan.layout, CODES[x.dtype] + wide),
        relu=plan.relu,
        threads=torch.get_num_threads(),
        parallel=_parallel(),
        x=_address(x),
        mean=mean,
        variance=variance,
        low=low,
        rstd=rstd,
        mask=_address(mask),
        **{name: _address(tensor) for name, tensor in given.items()},
    )
    library.run(name, call)


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
