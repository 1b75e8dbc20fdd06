# What it shares with passes.py is theirs alone.
# pyright: reportPrivateUsage=false
"""PyTorch under ``torch.compile``: the compiled passes, as operations that a graph can hold.

Inductor makes of the composite several loops over the data. Here a graph has one node forward and
one backward, which run what ``passes.py`` runs in eager code; sizes may be symbols. What stands
before and behind is fused with other things than these.
"""

from __future__ import annotations

from typing import Any

import torch

from truenorm._kernels import library
from truenorm._kernels.contract import Moving, Normalized, Options, Tensor, Vector
from truenorm._kernels.torch import native, passes


def takes(x: Tensor, options: Options) -> bool:
    """Whether this is a training step by the numbers that ``torch.compile`` makes a graph of.

    Exporters write for machines without this package, and function transforms do not know it.
    """
    plain = options.mask is None and options.add is None and options.correct is None
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and plain
        and options.moving is not None
        and options.moving.momentum is not None
        and type(x) in passes.PLAIN
        and x.device.type == "cpu"
        and x.dtype in native.DTYPES
        and _can_run()
    )


@torch.compiler.assume_constant_result
def _can_run() -> bool:
    """Asked while the graph is made."""
    transformed: Any = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    forward_mode = getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0
    return library.loaded() is not None and not transformed() and not forward_mode


def normalize(x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options) -> Normalized:
    """See :mod:`truenorm._kernels`; of a batch that :func:`takes` takes."""
    moving: Any = options.moving
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma, beta = (None if weight is None else weight.to(wide) for weight in (gamma, beta))
    mean, variance = (values.detach().to(wide) for values in (moving.mean, moving.variance))
    channel = options.axis % x.dim()
    how = (channel, options.epsilon, options.relu)
    output, rows = _forward(x, gamma, beta, mean, variance, *how, moving.momentum, moving.unbiased)
    rows = rows.detach()
    moved = (rows[4].to(moving.mean.dtype), rows[5].to(moving.variance.dtype))
    count = x.numel() // max(x.shape[channel], 1)
    return Normalized(output, rows[0], rows[1], count, moved=moved)


@torch.library.custom_op(
    "truenorm::forward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor variance, int channel,"
    " float epsilon, bool relu, float momentum, bool unbiased) -> (Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
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
    return native.forward(plan, x, gamma, beta, None, rows, moving), rows


@_forward.register_fake
def _forward_shapes(
    x: Tensor, gamma: Any, beta: Any, mean: Vector, variance: Any, channel: int, *_: Any
) -> Any:
    del gamma, beta, variance
    x = passes._dense(x, channel)[0]
    return torch.empty_like(x), mean.new_empty(6, x.shape[channel])


@torch.library.custom_op(
    "truenorm::backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor gradient, Tensor x, Tensor? gamma, Tensor? beta, Tensor rows, int channel,"
    " float epsilon, bool relu) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    rows: Tensor,
    channel: int,
    epsilon: float,
    relu: bool,
) -> Any:
    """The gradients of x, gamma and beta."""
    x, layout = passes._dense(x, channel)
    plan = passes.Plan(layout, channel, epsilon, relu)
    gradient = passes._as_laid_out(gradient, x)
    gamma, beta = passes._wide(gamma, rows.dtype), passes._wide(beta, rows.dtype)
    rows = rows.contiguous()
    return native.backward(plan, gradient, x, gamma, beta, None, rows, needed=True)


@_backward.register_fake
def _backward_shapes(
    gradient: Any, x: Tensor, gamma: Any, beta: Any, rows: Tensor, channel: int, *_: Any
) -> Any:
    del gradient, gamma, beta
    x = passes._dense(x, channel)[0]
    channels = x.shape[channel]
    return torch.empty_like(x), rows.new_empty(channels), rows.new_empty(channels)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, beta, _, _, *how = inputs
    ctx.how = tuple(how[:3])
    # Beta only for ReLU's derivative: an optimizer may change it before the backward pass.
    ctx.save_for_backward(x, gamma, beta if ctx.how[2] else None, output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Any) -> Any:
    x, gamma, beta, rows = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again, by a compiler that runs the graph
        found = passes.differentiable(gradient, x, gamma, beta, None, rows, *ctx.how)
    else:
        found = _backward(gradient, x, gamma, beta, rows, *ctx.how)
    needed = (
        part if needs else None for part, needs in zip(found, ctx.needs_input_grad, strict=False)
    )
    return *needed, *[None] * 7


_forward.register_autograd(_gradients, setup_context=_keep)
