# What it shares with passes.py is theirs alone.
# pyright: reportPrivateUsage=false
"""PyTorch under ``torch.compile``: ``passes.py`` as operations that a graph can hold.

Inductor makes of the composite several loops over the data. Here a graph has one node forward and
one backward, which run what runs in eager code: the compiled passes, on a GPU Triton's. Sizes may
be symbols. What stands before and behind is fused with other things than these.
"""

from __future__ import annotations

from typing import Any

import torch

from truenorm._kernels.contract import Moving, Normalized, Options, Tensor, Vector
from truenorm._kernels.torch import passes


def takes(x: Tensor, options: Options) -> bool:
    """Whether this is a training step by the numbers that ``torch.compile`` makes a graph of.

    Exporters write for machines without this package, and function transforms do not know it.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and options.mask is None
        and options.correct is None
        and options.moving is not None
        and options.moving.momentum is not None
        and type(x) in passes.PLAIN
        and x.numel() > 0
        and _can_run(x.device.type, x.dtype)
    )


@torch.compiler.assume_constant_result
def _can_run(device: str, dtype: Any) -> bool:
    """Asked while the graph is made."""
    transformed: Any = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    forward_mode = getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0
    there = passes._passes(device)
    return there is not None and dtype in there.DTYPES and not transformed() and not forward_mode


def normalize(x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options) -> Normalized:
    """See :mod:`truenorm._kernels`; of a batch that :func:`takes` takes."""
    moving: Any = options.moving
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma, beta = (None if weight is None else weight.to(wide) for weight in (gamma, beta))
    mean, variance = (values.detach().to(wide) for values in (moving.mean, moving.variance))
    channel = options.axis % x.dim()
    how = (channel, options.epsilon, options.relu, moving.momentum, moving.unbiased)
    output, rows = _forward(x, gamma, beta, options.add, mean, variance, *how)
    rows = rows.detach()
    moved = (rows[4].to(moving.mean.dtype), rows[5].to(moving.variance.dtype))
    count = x.numel() // max(x.shape[channel], 1)
    return Normalized(output, rows[0], rows[1], count, moved=moved)


@torch.library.custom_op(
    "truenorm::forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? gamma, Tensor? beta, Tensor? add, Tensor mean, Tensor variance,"
    " int channel, float epsilon, bool relu, float momentum, bool unbiased) -> (Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    add: Tensor | None,
    mean: Vector,
    variance: Vector,
    channel: int,
    epsilon: float,
    relu: bool,
    momentum: float,
    unbiased: bool,
) -> Any:
    """The output, and the statistics in rows, as in ``passes.normalize``."""
    x, layout = passes._dense(x, channel)
    rows = mean.new_empty(6, layout[1])
    plan = passes.Plan(layout, channel, epsilon, relu)
    gamma, beta, mean, variance = (
        passes._wide(values, rows.dtype) for values in (gamma, beta, mean, variance)
    )
    moving = Moving(mean, variance, momentum, unbiased)
    add = None if add is None else passes._as_laid_out(add, x)
    there: Any = passes._passes(x.device.type)
    return there.forward(plan, x, gamma, beta, None, rows, moving, add), rows


@_forward.register_fake
def _forward_shapes(
    x: Tensor, gamma: Any, beta: Any, add: Any, mean: Vector, variance: Any, channel: int, *_: Any
) -> Any:
    del gamma, beta, add, variance
    x = passes._dense(x, channel)[0]
    return torch.empty_like(x), mean.new_empty(6, x.shape[channel])


@torch.library.custom_op(
    "truenorm::backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor? gamma, Tensor? beta, Tensor rows, Tensor? output,"
    " int channel, float epsilon, bool relu) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    rows: Tensor,
    output: Tensor | None,
    channel: int,
    epsilon: float,
    relu: bool,
) -> Any:
    """The gradients of x, gamma and beta; by the signs of an output also that of what was added."""
    x, layout = passes._dense(x, channel)
    plan = passes.Plan(layout, channel, epsilon, relu)
    gradient = passes._as_laid_out(gradient, x)
    gamma, beta = passes._wide(gamma, rows.dtype), passes._wide(beta, rows.dtype)
    given = (x, gamma, beta, None, rows.contiguous())
    there: Any = passes._passes(x.device.type)
    if output is None:
        return *there.backward(plan, gradient, *given, needed=True), x.new_empty(0)
    behind = torch.empty_like(x)
    output = passes._as_laid_out(output, x)
    found = there.backward(plan, gradient, *given, needed=True, output=output, behind=behind)
    return *found, behind


@_backward.register_fake
def _backward_shapes(
    gradient: Any,
    x: Tensor,
    gamma: Any,
    beta: Any,
    rows: Tensor,
    output: Any,
    channel: int,
    *_: Any,
) -> Any:
    del gradient, gamma, beta
    x = passes._dense(x, channel)[0]
    per_channel = (rows.new_empty(x.shape[channel]) for _ in range(2))
    return (
        torch.empty_like(x),
        *per_channel,
        x.new_empty(0) if output is None else torch.empty_like(x),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, beta, add, _, _, *how = inputs
    ctx.how = tuple(how[:3])
    # For ReLU's derivative: the output, or, so that it is not kept, beta, which an optimizer may
    # change before the backward pass.
    signs = (None, output[0]) if add is not None else (beta, None)
    ctx.save_for_backward(x, gamma, output[1], *(signs if ctx.how[2] else (None, None)))


def _gradients(ctx: Any, gradient: Tensor, _: Any) -> Any:
    x, gamma, rows, beta, output = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again, by a compiler that runs the graph
        channel, epsilon, relu = ctx.how
        if output is not None:
            gradient, relu = torch.where(output > 0, gradient, 0), False
        found = passes.differentiable(gradient, x, gamma, beta, None, rows, channel, epsilon, relu)
    else:
        *found, behind = _backward(gradient, x, gamma, beta, rows, output, *ctx.how)
        gradient = gradient if output is None else behind
    needed = (
        part if needs else None
        for part, needs in zip((*found, gradient), ctx.needs_input_grad, strict=False)
    )
    return *needed, *[None] * 7


_forward.register_autograd(_gradients, setup_context=_keep)
