"""PyTorch on a processor: the compiled passes, and a derivative around them.

They read x in any dense order, so channels last and channels first, in either of PyTorch's memory
formats, are read where they lie. For the backward pass x and numbers per channel are kept; the
signs that ReLU's derivative needs are found again from x.

A derivative that shall be differentiated (``create_graph=True``) is made of PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from truenorm._keras_internals import in_stateless_scope
from truenorm._kernels import closed_form, library
from truenorm._kernels.contract import Moving, Normalized, Options, Tensor, Vector

DTYPES = {getattr(torch, name): code for name, code in library.DTYPES.items()}
PLAIN = (torch.Tensor, torch.nn.Parameter)
Layout = tuple[int, int, int]


class Plan(NamedTuple):
    """What one call is of, beside tensors that are differentiated or kept."""

    layout: Layout
    channel: int
    epsilon: float
    relu: bool
    rows: Tensor
    moving: Moving | None


def takes(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the compiled passes can take this tensor now, and what goes with it, or None.

    All must have memory here: while Keras finds out shapes, weights have none.
    """
    return x.dtype in DTYPES and _plain(x, *weights) and library.loaded() is not None


def watched(*tensors: Tensor | None) -> bool:
    """Whether somebody sees each operation on these; yes where it is not known.

    A compiler, a tracer, an exporter, a function transform, a dispatch mode, a subclass of tensors:
    they need operations that they know, and may have no numbers to decide by.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return True
    if any(tensor is not None and type(tensor) not in PLAIN for tensor in tensors):
        return True
    try:
        return (
            forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
            or torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportPrivateUsage]
            or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
        )
    except AttributeError:  # another version of PyTorch
        return True


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these are numbers in memory, and nobody watches what is done with them."""
    return all(tensor is None or tensor.is_cpu for tensor in tensors) and not watched(*tensors)


def _batched(gradient: Tensor) -> bool:
    """Whether this is many gradients at once (``vectorize=True``); yes where it is not known."""
    try:
        return torch._C._functorch.is_legacy_batchedtensor(gradient)  # pyright: ignore
    except AttributeError:
        return True


def normalize(x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options) -> Normalized:
    """See :mod:`truenorm._kernels`; with a mask the channels are last, and it is theirs alike."""
    axis, epsilon, mask, moving, relu = options
    x, layout = _dense(x, axis)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if mask is not None:
        mask = mask.squeeze(-1).broadcast_to(x.shape[:-1]).contiguous()
    writable = moving is not None and moving.momentum is not None and not in_stateless_scope()
    writable &= hasattr(torch.autograd.graph, "increment_version")
    if moving is not None:
        mean, variance = (_wide(values, wide) for values in moving[:2])
        writable &= mean is moving.mean and variance is moving.variance
        momentum = moving.momentum if writable else None
        moving = Moving(mean, variance, momentum, moving.unbiased)
    # Mean, variance, what rounding takes from the mean, rstd; and the moving ones after the step.
    # Of one shape with and without it: a checkpoint compares what is kept in both its passes.
    rows = torch.empty(6, layout[1], dtype=wide, device="cpu")
    plan = Plan(layout, axis % x.dim(), epsilon, relu, rows, moving)
    output = _Normalize.apply(x, _wide(gamma, wide), _wide(beta, wide), mask, plan)
    count = layout[0] * layout[2] if mask is None else mask.sum().to(wide)
    if moving is None or not writable:
        return Normalized(output, rows[0], rows[1], count)
    # Not in forward, which checkpoints repeat.
    for values, moved in zip(moving[:2], _addresses(rows)[4:], strict=True):
        ctypes.memmove(values.data_ptr(), moved, values.nbytes)
        torch.autograd.graph.increment_version(values)
    return Normalized(output, None, None, count, moved=())


def infer(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mean: Vector,
    variance: Vector,
    *,
    axis: int,
    epsilon: float,
) -> Tensor:
    """Normalise with statistics that are given; not differentiable."""
    x, layout = _dense(x.detach(), axis)
    output = torch.empty_like(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma, beta, mean, variance = (_wide(weight, wide) for weight in (gamma, beta, mean, variance))
    call = library.Call(
        *(*layout, DTYPES[x.dtype]),
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


class _Normalize(torch.autograd.Function):
    """The output; the statistics are written to ``plan.rows``.

    Without ``setup_context``, with which PyTorch inspects signatures at each call.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, gamma: Any, beta: Any, mask: Any, plan: Plan) -> Any:
        output = torch.empty_like(x)
        mean, variance, low, rstd, *moved = _addresses(plan.rows)
        moving = plan.moving or Moving(None, None)
        moved_mean, moved_variance = (0, 0) if moving.momentum is None else moved
        call = library.Call(
            *(*plan.layout, DTYPES[x.dtype]),
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
        ctx.plan = plan[:4]
        ctx.set_materialize_grads(False)
        # Beta only for ReLU's derivative: an optimizer may change it before the backward pass.
        ctx.save_for_backward(x, gamma, beta if plan.relu else None, mask, plan.rows)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if gradient is None:
            return None, None, None, None, None
        x, gamma, beta, mask, rows = ctx.saved_tensors
        layout, channel, _, relu = ctx.plan
        needed = ctx.needs_input_grad
        plain = _plain(gradient, x, gamma, beta, mask, rows) and not _batched(gradient)
        if torch.is_grad_enabled() or not plain:
            found = _differentiable(gradient, x, gamma, beta, mask, rows, *ctx.plan[1:])
        else:
            x, layout = _dense(x, channel)  # Who keeps tensors elsewhere may order them anew.
            if gradient.stride() != x.stride() or gradient.is_neg():
                gradient = torch.empty_like(x).copy_(gradient)
            d_x = torch.empty_like(x) if needed[0] else None
            d_gamma, d_beta = (
                torch.empty(layout[1], dtype=rows.dtype, device="cpu") for _ in range(2)
            )
            mean, _, low, rstd = _addresses(rows)[:4]
            call = library.Call(
                *(*layout, DTYPES[x.dtype]),
                relu=relu,
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
            found = (d_x, d_gamma, d_beta)
        needed = zip(found, needed, strict=False)
        return *(part if needs else None for part, needs in needed), None, None


def _differentiable(
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: Tensor | None,
    rows: Tensor,
    channel: int,
    epsilon: float,
    relu: bool,
) -> tuple[Tensor, Vector, Vector]:
    """The same in operations that can be differentiated to any order."""
    mean, variance = rows[:2]
    count = x.numel() // len(mean) if mask is None else mask.sum()
    d_x, d_gamma, d_beta = closed_form.backward_of_values(
        _LAST,
        gradient.to(rows.dtype).movedim(channel, -1),
        x.to(rows.dtype).movedim(channel, -1),
        torch.ones_like(mean) if gamma is None else gamma,
        torch.zeros_like(mean) if beta is None else beta,
        shift=mean,
        fallback=variance,
        count=torch.as_tensor(count, dtype=rows.dtype),
        epsilon=epsilon,
        counts=None if mask is None else mask[..., None],
        relu=relu,
    )
    return d_x.movedim(-1, channel).to(x.dtype), d_gamma, d_beta


_LAST = closed_form.Rows(
    total=lambda values: values.sum(tuple(range(values.dim() - 1))),
    spread=lambda per_channel, _: per_channel,
)


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
    return range(start, start + step * len(rows), step)


@cache
def _parallel() -> int:
    """PyTorch's own threads, which are OpenMP's: others would compete with them."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except AttributeError:
        return library.own_threads()


def _wide(weight: Vector | None, dtype: Any) -> Vector | None:
    if weight is None or (weight.dtype == dtype and weight.is_contiguous() and not weight.is_neg()):
        return weight
    return weight.to(dtype).resolve_neg().contiguous()


def _dense(x: Tensor, axis: int) -> tuple[Tensor, Layout]:
    """The tensor, copied if its memory has gaps, and that memory as (outer, channels, inner)."""
    channel = axis % x.dim()
    if x.is_neg():  # A view can be the negative of its memory.
        x = x.resolve_neg()
    if x.is_contiguous():
        shape = x.shape
        return x, (math.prod(shape[:channel]), shape[channel], math.prod(shape[channel + 1 :]))
    for at in (-1, 1):
        ordered = x.movedim(channel, at)
        if ordered.is_contiguous():
            return x, _dense(ordered, at)[1]
    return _dense(x.contiguous(), axis)
