"""PyTorch: passes over the data that are our own, and a derivative around them.

On a processor they are compiled (``native.py``), on a GPU kernels of Triton (``triton_passes.py``).
They read x in any dense order, so channels last and channels first, in either of PyTorch's memory
formats, are read where they lie. For the backward pass x and numbers per channel are kept; the
signs that ReLU's derivative needs are found again from x, or, where something was added before it,
read off the output.

A derivative that shall be differentiated (``create_graph=True``) is made of PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from truenorm._keras_internals import in_stateless_scope
from truenorm._kernels import closed_form, library
from truenorm._kernels.contract import Moving, Normalized, Options, Tensor, Vector
from truenorm._kernels.torch import native

PLAIN = (torch.Tensor, torch.nn.Parameter)
CAN_WRITE = hasattr(torch.autograd.graph, "increment_version")
"""Whether this PyTorch can be told that numbers have changed in memory."""
Layout = tuple[int, int, int]


class Plan(NamedTuple):
    """What one call is of, beside tensors."""

    layout: Layout
    channel: int
    epsilon: float
    relu: bool
    known: bool = False
    """Whether the statistics were found before."""


def takes(x: Tensor, mask: Tensor | None = None, *weights: Tensor | None) -> bool:
    """Whether there are passes that can take this tensor now, and what goes with it, or None.

    All must have memory here: while Keras finds out shapes, weights have none.
    """
    if not _plain(x.device, x, mask, *weights):
        return False
    passes = _passes(x.device.type)
    return (
        passes is not None
        and x.dtype in passes.DTYPES
        and (passes.MASKS or (mask is None and x.numel() > 0))
    )


def _passes(device: str) -> Any | None:
    """Those of a kind of device, if there are any."""
    if device == "cpu":
        return native if library.loaded() is not None else None
    return _of_triton() if device == "cuda" else None


@cache
def _of_triton() -> Any | None:
    if find_spec("triton") is None:
        return None
    from truenorm._kernels.torch import triton_passes

    return triton_passes


def watched(*tensors: Tensor | None) -> bool:
    """Whether somebody sees each operation on these; yes where it is not known.

    A compiler, a tracer, an exporter, a function transform, a dispatch mode, a subclass of tensors:
    they need operations that they know, and may have no numbers to decide by.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return True
    for tensor in tensors:  # not by any(): this is asked at each step
        if tensor is not None and type(tensor) not in PLAIN:
            return True
    try:
        return (
            forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
            or torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportPrivateUsage]
            or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
        )
    except AttributeError:  # another version of PyTorch
        return True


def _plain(device: Any, *tensors: Tensor | None) -> bool:
    """Whether these are numbers in that device's memory, and nobody watches what is done there."""
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            return False
    return not watched(*tensors)


def _batched(gradient: Tensor) -> bool:
    """Whether this is many gradients at once (``vectorize=True``); yes where it is not known."""
    try:
        return torch._C._functorch.is_legacy_batchedtensor(gradient)  # pyright: ignore
    except AttributeError:
        return True


def normalize(x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options) -> Normalized:
    """See :mod:`truenorm._kernels`; with a mask the channels are last, and it is theirs alike."""
    axis, epsilon, mask, moving, relu, add, correct = options
    x, layout = _dense(x, axis)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if mask is not None:
        mask = mask.squeeze(-1).broadcast_to(x.shape[:-1]).contiguous()
    steps = False
    if moving is not None:
        mean, variance = _wide(moving.mean, wide), _wide(moving.variance, wide)
        there = mean is moving.mean and variance is moving.variance
        # The halves of the pass, which a correction takes, do not take the step.
        steps = there and CAN_WRITE and correct is None and not in_stateless_scope()
        if not steps:
            moving = Moving(mean, variance, None, moving.unbiased)
        steps = moving.momentum is not None
    # Mean, variance, what rounding takes from the mean, rstd; and the moving ones after the step.
    # Of one shape with and without it: a checkpoint compares what is kept in both its passes.
    rows = torch.empty(6, layout[1], dtype=wide, device=x.device)
    plan = Plan(layout, axis % x.dim(), epsilon, relu, known=correct is not None)
    count = layout[0] * layout[2] if mask is None else mask.sum().to(wide)
    if correct is not None:
        halves: Any = _passes(x.device.type)
        mean, variance = halves.moments(plan, x.detach(), mask)
        if mask is not None and moving is not None:  # It normalises where nothing counts.
            some = mask.any()
            mean = torch.where(some, mean, moving.mean)
            variance = torch.where(some, variance, moving.variance)
        write_statistics(rows, mean, variance, epsilon)
        gamma, beta = correct(Normalized(None, rows[0], rows[1], count), gamma, beta)
    weights = (_wide(gamma, wide), _wide(beta, wide))
    output = _Normalize.apply(x, *weights, add, (mask, rows, moving, plan))
    if moving is None or not steps:
        return Normalized(output, rows[0], rows[1], count)
    # Not in forward, which checkpoints repeat.
    _write(moving.mean, rows, 4)
    _write(moving.variance, rows, 5)
    return Normalized(output, None, None, count, moved=())


def write_statistics(rows: Tensor, mean: Vector, variance: Vector, epsilon: float) -> None:
    """Mean, variance, what rounding takes from the mean, and rstd, from numbers in float64."""
    rows[0] = mean
    rows[1] = variance
    rows[2] = mean - rows[0]
    rows[3] = torch.rsqrt(variance + epsilon)


def _write(values: Tensor, rows: Tensor, row: int) -> None:
    """Copy a row of numbers to where others lie, which autograd may have kept."""
    if values.is_cpu:  # at a fraction of what a view and a copy by PyTorch cost
        size = values.nbytes
        ctypes.memmove(values.data_ptr(), rows.data_ptr() + row * size, size)
        torch.autograd.graph.increment_version(values)
    else:
        values.detach().copy_(rows[row])


def infer(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mean: Vector,
    variance: Vector,
    options: Options,
) -> Tensor:
    """Normalise with statistics that are given, on a processor; not differentiable."""
    x, layout = _dense(x.detach(), options.axis)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma, beta = _wide(gamma, wide), _wide(beta, wide)
    mean, variance = _wide(mean, wide), _wide(variance, wide)
    plan = Plan(layout, options.axis, options.epsilon, options.relu)
    add = None if options.add is None else _as_laid_out(options.add.detach(), x)
    return native.infer(plan, x, gamma, beta, mean, variance, add)


class _Normalize(torch.autograd.Function):
    """The output; the statistics are written to ``rows``.

    Without ``setup_context``, with which PyTorch inspects signatures at each call.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, gamma: Any, beta: Any, add: Any, given: tuple[Any, Any, Any, Plan]
    ) -> Any:
        mask, rows, moving, plan = given  # as one, since PyTorch looks at each argument
        passes: Any = _passes(x.device.type)
        ctx.passes, ctx.plan = passes, plan
        ctx.set_materialize_grads(False)
        if add is not None:
            add = _as_laid_out(add, x)
        if plan.known:
            output = passes.normalize(plan, x, gamma, beta, rows)
        else:
            output = passes.forward(plan, x, gamma, beta, mask, rows, moving, add)
        # For ReLU's derivative: the output, or, so that it is not kept, beta.
        signs = (None, output) if add is not None else (beta, None)
        ctx.save_for_backward(x, gamma, mask, rows, *(signs if plan.relu else (None, None)))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if gradient is None:
            return (None,) * 5
        x, gamma, mask, rows, beta, output = ctx.saved_tensors
        needed, plan = ctx.needs_input_grad, ctx.plan
        plain = _plain(x.device, gradient, x, gamma, beta, mask, rows) and not _batched(gradient)
        if torch.is_grad_enabled() or not plain:
            if output is not None:
                gradient = torch.where(output > 0, gradient, 0)
                plan = plan._replace(relu=False)
            found = differentiable(gradient, x, gamma, beta, mask, rows, *plan[1:4])
        else:
            # Who keeps tensors elsewhere may order them anew.
            x, layout = _dense(x, plan.channel)
            gradient = _as_laid_out(gradient, x)
            plan = plan if layout == plan.layout else plan._replace(layout=layout)
            given = (x, gamma, beta, mask, rows)
            if output is None:
                found = ctx.passes.backward(plan, gradient, *given, needed[0])
            else:
                signs, behind = _as_laid_out(output, x), torch.empty_like(x)
                found = ctx.passes.backward(plan, gradient, *given, needed[0], signs, behind)
                gradient = behind
        found = (part if needs else None for part, needs in zip(found, needed, strict=False))
        return *found, gradient if needed[3] else None, None


def differentiable(
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
    """The gradients of x, gamma and beta in operations that can be differentiated to any order."""
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


def _wide(weight: Vector | None, dtype: Any) -> Vector | None:
    if weight is None or (weight.dtype == dtype and weight.is_contiguous() and not weight.is_neg()):
        return weight
    return weight.to(dtype).resolve_neg().contiguous()


def _as_laid_out(values: Tensor, x: Tensor) -> Tensor:
    """In memory as x is."""
    if values.stride() == x.stride() and not values.is_neg():
        return values
    return torch.empty_like(x).copy_(values)


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
