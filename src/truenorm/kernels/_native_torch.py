"""PyTorch on a processor: the compiled passes, and a derivative around them.

They read x in any dense order, so channels last and channels first, in either of PyTorch's memory
formats, are read where they lie. For the backward pass x and numbers per channel are kept; the
signs that ReLU's derivative needs are found again from x.

A derivative that shall be differentiated (``create_graph=True``) is PyTorch's own operation,
around the mean. Third derivatives are not right.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad

from truenorm.kernels import _native
from truenorm.kernels._contract import Normalized

DTYPES = {getattr(torch, name): code for name, code in _native.DTYPES.items()}
Layout = tuple[int, int, int]


def takes(x: Any, *weights: Any) -> bool:
    """Whether the compiled passes can take this tensor now, and what goes with it, or None.

    All must have memory here: while Keras finds out shapes, weights have none.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or x.dtype not in DTYPES
        or not _plain(x, *weights)
        or _native.library() is None
    )


def _plain(*tensors: Any) -> bool:
    """Whether these are numbers in memory, and nobody watches what is done with them."""
    return (
        forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
        and torch._C._len_torch_dispatch_stack() == 0  # pyright: ignore[reportPrivateUsage]
        and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
        and all(
            t.device.type == "cpu" and type(t) in (torch.Tensor, torch.nn.Parameter)
            for t in tensors
            if t is not None
        )
    )


def normalize(
    x: Any, gamma: Any, beta: Any, *, axis: int, epsilon: float, relu: bool
) -> Normalized:
    """See :mod:`truenorm.kernels`."""
    x, layout = _dense(x, axis)
    how = (layout, axis % x.dim(), epsilon, relu)
    output, kept, finite = _Normalize.apply(x, _wide(gamma, x), _wide(beta, x), how)
    count = layout[0] * layout[2]
    return Normalized(output, kept[0], kept[1], count, finite=finite)


def infer(
    x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, *, axis: int, epsilon: float
) -> Any:
    """Normalise with statistics that are given; not differentiable."""
    x, layout = _dense(x.detach(), axis)
    output = torch.empty_like(x)
    weights = (_wide(weight, x) for weight in (gamma, beta, mean, variance))
    _run("tn_infer", layout, epsilon, False, x, None, *weights, *[None] * 4, output)
    return output


class _Normalize(torch.autograd.Function):
    """The output, and in rows: mean, variance, what rounding takes from the mean, and rstd.

    Without ``setup_context``, with which PyTorch inspects signatures at each call.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, gamma: Any, beta: Any, how: tuple[Layout, int, float, bool]
    ) -> tuple[Any, Any, bool]:
        layout, _, epsilon, relu = how
        output = torch.empty_like(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        kept = torch.empty(4, layout[1], dtype=dtype, device=x.device)
        arrays = (x, None, gamma, beta, *_addresses(kept), None, None, output)
        finite = _run("tn_forward", layout, epsilon, relu, *arrays)
        ctx.how = how
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gamma, beta, kept)
        return output, kept, finite

    @staticmethod
    def backward(ctx: Any, gradient: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if gradient is None:
            return None, None, None, None
        x, gamma, beta, kept = ctx.saved_tensors
        layout, channel, epsilon, relu = ctx.how
        batched = torch._C._functorch.is_legacy_batchedtensor(gradient)  # pyright: ignore
        if torch.is_grad_enabled() or batched or not _plain(gradient, x, gamma, beta, kept):
            found = _differentiable(gradient, x, gamma, beta, kept, channel, epsilon, relu)
        else:
            x, layout = _dense(x, channel)  # Who keeps tensors elsewhere may order them anew.
            gradient = gradient.resolve_neg()
            if gradient.stride() != x.stride():
                gradient = torch.empty_like(x).copy_(gradient)
            d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            sums = torch.empty_like(kept[:2])
            arrays = (x, gradient, gamma, beta, *_addresses(kept), *_addresses(sums), d_x)
            _run("tn_backward", layout, epsilon, relu, *arrays)
            found = (d_x, *sums)
        needed = zip(found, ctx.needs_input_grad[:3], strict=True)
        return *(part if needs else None for part, needs in needed), None


def _differentiable(
    gradient: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    kept: Any,
    channel: int,
    epsilon: float,
    relu: bool,
) -> tuple[Any, Any, Any]:
    mean, _, low, rstd = kept
    rows, gradient = (t.to(kept.dtype).movedim(channel, 1) for t in (x, gradient))
    shape = [-1, *[1] * (x.dim() - 2)]
    rows = rows - mean.reshape(shape)
    scale = rstd if gamma is None else rstd * gamma.detach()
    if relu:
        offset = -low * scale if beta is None else beta.detach() - low * scale
        output = rows.detach() * scale.reshape(shape) + offset.reshape(shape)
        gradient = gradient * (output > 0)
    d_x, d_gamma, d_beta = torch.ops.aten.native_batch_norm_backward(
        gradient, rows, gamma, None, None, low, rstd, True, epsilon, [True] * 3
    )
    return d_x.movedim(1, channel).to(x.dtype), d_gamma, d_beta


def _run(name: str, layout: Layout, epsilon: float, relu: bool, x: Any, *arrays: Any) -> bool:
    """Call a function of the library; arrays are tensors, addresses, or None."""
    addresses = [0 if a is None else a if isinstance(a, int) else _address(a) for a in (x, *arrays)]
    how = (DTYPES[x.dtype], relu, torch.get_num_threads(), epsilon, _parallel())
    return _native.run(name, *layout, *how, *addresses)


def _address(tensor: Any) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel() > 0:
        raise RuntimeError("a tensor of BatchNormalization has no memory")
    return address


def _addresses(rows: Any) -> range:
    """Those of the rows of a contiguous matrix."""
    start, step = rows.data_ptr(), rows.stride(0) * rows.element_size()
    return range(start, start + step * len(rows), step)


@cache
def _parallel() -> int:
    """PyTorch's own threads, which are OpenMP's: others would compete with them."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except AttributeError:
        return _native.own_threads()


def _wide(weight: Any, x: Any) -> Any:
    if weight is None:
        return None
    weight = weight.to(x.dtype if x.dtype == torch.float64 else torch.float32)
    return weight.resolve_neg().contiguous()


def _dense(x: Any, axis: int) -> tuple[Any, Layout]:
    """The tensor, copied if its memory has gaps, and that memory as (outer, channels, inner)."""
    channel = axis % x.dim()
    x = x.resolve_neg()  # A view can be the negative of its memory.
    if x.is_contiguous():
        shape = x.shape
        return x, (math.prod(shape[:channel]), shape[channel], math.prod(shape[channel + 1 :]))
    for at in (-1, 1):
        ordered = x.movedim(channel, at)
        if ordered.is_contiguous():
            return x, _dense(ordered, at)[1]
    return _dense(x.contiguous(), axis)
