# Triton compiles its kernels; what they take has no type that it reads.
# ruff: noqa: ANN001, ANN202
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportUnknownParameterType=false
"""PyTorch on a GPU: the passes of ``native/`` as Triton kernels, where Triton is installed.

An array is (outer, channels, inner), contiguous, as in ``native/batchnorm.h``. A row is what has
one value of each channel. Programs divide the channels in blocks and the rows in strips. The
arithmetic is that of ``native/statistics.h``: a tile's moments are found twice in registers, so
that they lose no digits where the mean is large, and joined in float64 as count, mean and M2; sums
of products are joined in float64 too. The order is fixed: results are the same bits each time.
There are two kernels each way; each program of the second joins what the first found of its
channels, which costs less than a third kernel. Nothing waits for the GPU.

Of a batch that is divided among processes (``synchronized.py``) the first kernel of each way finds
what PyTorch's operations join, and one that knows the whole batch's numbers does the rest.

PyTorch brings Triton where it brings CUDA. With ``TRITON_INTERPRET=1`` the kernels run on a
processor, slowly: the tests do that.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton
from triton import language as tl

from truenorm._kernels.contract import Moving, Tensor, Vector

if TYPE_CHECKING:
    from truenorm._kernels.torch.passes import Layout, Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASKS = False
WARPS = 8


class Cut(NamedTuple):
    """How programs divide an array."""

    tile: int  # rows of a tile
    width: int  # channels of a tile, and of a block
    strip: int  # rows of a program: some tiles
    strips: int
    most: int  # strips, up to a power of 2
    blocks: int


def forward(
    plan: Plan,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: None,
    rows: Tensor,
    moving: Moving | None,
    add: Tensor | None = None,
) -> Tensor:
    """The output; the statistics are written to ``rows``."""
    del mask
    output = torch.empty_like(x)
    grid, parts, sizes = _divided(x, plan.layout)
    if moving is None or moving.momentum is None:  # no step to take
        moving = Moving(None, None)
    momentum = moving.momentum or 0.0
    coarse = float(np.float32(momentum))  # Triton takes float32
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _moments[grid](x, parts, *sizes[:-2], num_warps=WARPS)
        _normalize[grid](
            *(x, add, output, parts, rows, gamma, beta, moving.mean, moving.variance),
            *(plan.epsilon, coarse, momentum - coarse, moving.unbiased, plan.relu),
            *sizes,
            num_warps=WARPS,
        )
    return output


def backward(
    plan: Plan,
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: None,
    rows: Tensor,
    needed: bool,
    output: Tensor | None = None,
    behind: Tensor | None = None,
) -> tuple[Tensor | None, Vector, Vector]:
    """The gradients of x, if needed, gamma and beta; as in ``native.py``."""
    del mask
    grid, parts, sizes = _divided(x, plan.layout)
    d_x = torch.empty_like(x) if needed else None
    d_gamma, d_beta = rows.new_empty(plan.layout[1]), rows.new_empty(plan.layout[1])
    relu = plan.relu and output is None
    with torch.cuda.device_of(x):
        _products[grid](
            *(x, gradient, output, behind, rows, gamma, beta, parts, relu),
            *sizes[:-2],
            num_warps=WARPS,
        )
        _gradient[grid if needed else (grid[0], 1)](
            *(x, gradient if behind is None else behind, d_x, rows, gamma, beta, parts),
            *(d_gamma, d_beta, relu),
            *sizes,
            num_warps=WARPS,
        )
    return d_x, d_gamma, d_beta


def moments(plan: Plan, x: Tensor, mask: None) -> Tensor:
    """Mean and variance of a part of a batch, in float64."""
    del mask
    if x.numel() == 0:
        return torch.zeros(2, plan.layout[1], dtype=torch.float64, device=x.device)
    grid, parts, sizes = _divided(x, plan.layout)
    with torch.cuda.device_of(x):
        _moments[grid](x, parts, *sizes[:-2], num_warps=WARPS)
    rows, strip = sizes[0], sizes[2]
    starts = torch.arange(0, rows, strip, device=x.device, dtype=torch.float64)
    size = (rows - starts).clamp_(max=strip)[:, None]
    means, m2 = parts.unbind(1)
    mean = (means * size).sum(0) / rows
    m2 = m2 + (means - mean).square_() * size
    return torch.stack([mean, m2.sum(0) / rows])


def normalize(
    plan: Plan, x: Tensor, gamma: Vector | None, beta: Vector | None, rows: Tensor
) -> Tensor:
    """The output for a part of a batch, whose statistics are in ``rows``."""
    output = torch.empty_like(x)
    if x.numel() > 0:
        grid, _, sizes = _divided(x, plan.layout)
        with torch.cuda.device_of(x):
            _normalize_part[grid](
                x, output, rows, gamma, beta, plan.relu, *sizes[:-2], num_warps=WARPS
            )
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
    if x.numel() == 0:
        return torch.zeros_like(rows[:2])
    grid, parts, sizes = _divided(x, plan.layout)
    with torch.cuda.device_of(x):
        _products[grid](
            *(x, gradient, None, None, rows, gamma, beta, parts, plan.relu),
            *sizes[:-2],
            num_warps=WARPS,
        )
    total, product = parts.sum(0)
    _, _, low, rstd = rows[:4]
    return torch.stack([(product - low * total) * rstd, total]).to(rows.dtype)


def gradient(
    plan: Plan,
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: None,
    rows: Tensor,
    means: Tensor,
) -> Tensor:
    """The gradient of x, from those of gamma and beta of the whole batch by its count."""
    del mask
    d_x = torch.empty_like(x)
    if x.numel() > 0:
        grid, _, sizes = _divided(x, plan.layout)
        with torch.cuda.device_of(x):
            _gradient_part[grid](
                *(x, gradient, d_x, rows, gamma, beta, means, plan.relu),
                *sizes[:-2],
                num_warps=WARPS,
            )
    return d_x


def _divided(x: Tensor, layout: Layout) -> tuple[tuple[int, int], Tensor, tuple[Any, ...]]:
    """The grid, memory for two numbers of each strip and channel, and arguments that say both."""
    outer, channels, inner = layout
    cut = _cut(outer * inner, channels, inner, _programs(x.device))
    parts = torch.empty(cut.strips, 2, channels, dtype=torch.float64, device=x.device)
    sizes = (outer * inner, channels, cut.strip, cut.tile, cut.width, inner, x.numel() >= 2**31)
    return (cut.blocks, cut.strips), parts, (*sizes, cut.strips, cut.most)


@cache
def _programs(device: torch.device) -> int:
    """How many keep a device busy."""
    if device.type != "cuda":
        return 6  # of the interpreter: some strips, so that they are joined
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _cut(rows: int, channels: int, inner: int, programs: int) -> Cut:
    """Tiles of 8,192 values at most, along what lies side by side in memory."""
    width = min(triton.next_power_of_2(channels), 32) if inner == 1 else 1
    tile = min(8192 // width, triton.next_power_of_2(rows))
    blocks = triton.cdiv(channels, width)
    tiles = triton.cdiv(rows, tile)
    strips = min(tiles, triton.cdiv(programs, blocks))
    strip = triton.cdiv(tiles, strips) * tile
    strips = triton.cdiv(rows, strip)
    return Cut(tile, width, strip, strips, triton.next_power_of_2(strips), blocks)


@triton.jit
def _columns(channels, width: tl.constexpr):
    """The channels of this program, and which of them exist."""
    column = tl.program_id(0) * width + tl.arange(0, width)
    return column, column < channels


@triton.jit
def _places(
    start, rows, channels, tile: tl.constexpr, width: tl.constexpr, inner: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """Where the values of a tile lie, and which exist.

    ``inner`` is a constant, so that dividing by it is a multiplication.
    """
    row = start + tl.arange(0, tile)
    column, exist = _columns(channels, width)
    exist = (row < rows)[:, None] & exist[None, :]
    if wide:
        row, column = row.to(tl.int64), column.to(tl.int64)
    return (row // inner * channels * inner + row % inner)[:, None] + column[None, :] * inner, exist


@triton.jit
def _read(vectors, row: tl.constexpr, channels, width: tl.constexpr, default: tl.constexpr):
    """One of several vectors of numbers per channel; the default where there are none."""
    column, exist = _columns(channels, width)
    if vectors is None:
        numbers = tl.full((width,), default, tl.float32)
    else:
        numbers = tl.load(vectors + row * channels + column, exist, 0.0)
    return numbers


@triton.jit
def _write(vectors, row, channels, width: tl.constexpr, numbers):
    """One of several vectors of numbers per channel."""
    column, exist = _columns(channels, width)
    tl.store(vectors + row * channels + column, numbers.to(vectors.dtype.element_ty), exist)


@triton.jit
def _parts(
    parts, row: tl.constexpr, channels, strips, most: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """One of the two numbers of all strips, 0 where there is no strip."""
    at = tl.arange(0, most)
    column, exist = _columns(channels, width)
    exist = (at < strips)[:, None] & exist[None, :]
    return tl.load(parts + ((2 * at + row) * channels)[:, None] + column[None, :], exist, 0.0)


@triton.jit(do_not_specialize=("rows",))
def _moments(
    x, parts, rows, channels, strip, tile: tl.constexpr, width: tl.constexpr, inner: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of a strip."""
    first = tl.program_id(1) * strip
    mean = tl.zeros((width,), tl.float64)
    m2 = tl.zeros((width,), tl.float64)
    for start in range(first, min(first + strip, rows), tile):
        place, exist = _places(start, rows, channels, tile, width, inner, wide)
        values = tl.load(x + place, exist, 0.0).to(tl.float32)
        size = tl.cast(min(tile, rows - start), tl.float32)
        near = tl.sum(values, 0) / size
        # Of a constant near the largest float32 the sum is none: its first value is the mean.
        place, one = _places(start, rows, channels, 1, width, inner, wide)
        one_of = tl.sum(tl.load(x + place, one, 0.0).to(tl.float32), 0)
        near = tl.where(tl.abs(near) < float("inf"), near, one_of)
        deviations = tl.where(exist, values - near[None, :], 0.0)
        total = tl.sum(deviations, 0)
        inside = tl.sum(deviations * deviations, 0) - total * total / size
        inside = tl.where(inside < 0, 0.0, inside)  # a NaN stays
        before = tl.cast(start - first, tl.float64)
        part = size / (before + size)
        delta = near.to(tl.float64) + (total / size).to(tl.float64) - mean
        mean += delta * part
        m2 += inside + delta * delta * (before * part)
    _write(parts, 2 * tl.program_id(1), channels, width, mean)
    _write(parts, 2 * tl.program_id(1) + 1, channels, width, m2)


@triton.jit(do_not_specialize=("rows", "strips"))
def _normalize(
    x, add, output, parts, statistics, gamma, beta, moving_mean, moving_variance, epsilon, coarse,
    fine, unbiased: tl.constexpr, relu: tl.constexpr, rows, channels, strip, tile: tl.constexpr,
    width: tl.constexpr, inner: tl.constexpr, wide: tl.constexpr, strips, most: tl.constexpr,
):  # fmt: skip
    """The statistics of the batch, from those of strips; the moving ones after a step; a strip."""
    at = tl.arange(0, most)
    size = tl.where(at < strips, tl.minimum(strip, rows - at * strip), 0).to(tl.float64)[:, None]
    count = tl.cast(rows, tl.float64)
    means = _parts(parts, 0, channels, strips, most, width)
    exact = tl.sum(means * size, 0) / count
    away = means - exact[None, :]
    m2 = tl.sum(_parts(parts, 1, channels, strips, most, width) + away * away * size, 0)
    mean = exact.to(tl.float32)
    low = (exact - mean).to(tl.float32)
    variance = (m2 / count).to(tl.float32)
    rstd = (1.0 / tl.sqrt(m2 / count + epsilon)).to(tl.float32)
    if tl.program_id(1) == 0:
        _write(statistics, 0, channels, width, mean)
        _write(statistics, 1, channels, width, variance)
        _write(statistics, 2, channels, width, low)
        _write(statistics, 3, channels, width, rstd)
        if moving_mean is not None:
            momentum = tl.cast(coarse, tl.float64) + tl.cast(fine, tl.float64)
            rest = 1.0 - momentum
            finite = tl.abs(mean) + variance < float("inf")
            old = _read(moving_mean, 0, channels, width, 0.0)
            moved = momentum * old.to(tl.float64) + rest * exact
            _write(statistics, 4, channels, width, tl.where(finite, moved, old))
            old = _read(moving_variance, 0, channels, width, 0.0)
            freedom = tl.maximum(count - 1.0, 1.0) if unbiased else count
            moved = momentum * old.to(tl.float64) + rest * (m2 / freedom)
            _write(statistics, 5, channels, width, tl.where(finite & (rows > 1), moved, old))
    scale = _read(gamma, 0, channels, width, 1.0) * rstd
    offset = (_read(beta, 0, channels, width, 0.0) - low.to(tl.float64) * scale).to(tl.float32)
    first = tl.program_id(1) * strip
    for start in range(first, min(first + strip, rows), tile):
        place, exist = _places(start, rows, channels, tile, width, inner, wide)
        values = tl.load(x + place, exist, 0.0).to(tl.float32)
        values = (values - mean[None, :]) * scale[None, :] + offset[None, :]
        if add is not None:
            values += tl.load(add + place, exist, 0.0).to(tl.float32)
        if relu:
            values = tl.where(values < 0, 0.0, values)
        tl.store(output + place, values.to(output.dtype.element_ty), exist)


@triton.jit
def _constants(statistics, gamma, beta, channels, width: tl.constexpr):
    """Those of the output, as in :func:`_normalize`: mean, scale and offset; and low and rstd."""
    low = _read(statistics, 2, channels, width, 0.0)
    rstd = _read(statistics, 3, channels, width, 0.0)
    scale = _read(gamma, 0, channels, width, 1.0) * rstd
    offset = (_read(beta, 0, channels, width, 0.0) - low.to(tl.float64) * scale).to(tl.float32)
    return _read(statistics, 0, channels, width, 0.0), scale, offset, low.to(tl.float64), rstd


@triton.jit
def _tile(x, gradient, place, exist, mean, scale, offset, relu: tl.constexpr):
    """Deviations from the mean, and the gradient behind a ReLU, whose sign is found again."""
    deviations = tl.load(x + place, exist, 0.0).to(tl.float32) - mean[None, :]
    coming = tl.load(gradient + place, exist, 0.0).to(tl.float32)
    if relu:
        coming = tl.where(deviations * scale[None, :] + offset[None, :] > 0, coming, 0.0)
    return deviations, coming


@triton.jit(do_not_specialize=("rows",))
def _products(
    x, gradient, output, behind, statistics, gamma, beta, parts, relu: tl.constexpr, rows, channels,
    strip, tile: tl.constexpr, width: tl.constexpr, inner: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Of a strip: the sums of the gradient, and of it times the deviation from the mean.

    Where the output is given, it has the signs; what goes through the ReLU is written down.
    """
    mean, scale, offset, _, _ = _constants(statistics, gamma, beta, channels, width)
    total = tl.zeros((width,), tl.float64)
    product = tl.zeros((width,), tl.float64)
    first = tl.program_id(1) * strip
    for start in range(first, min(first + strip, rows), tile):
        place, exist = _places(start, rows, channels, tile, width, inner, wide)
        deviations, coming = _tile(x, gradient, place, exist, mean, scale, offset, relu)
        if output is not None:
            coming = tl.where(tl.load(output + place, exist, 0.0) > 0, coming, 0.0)
            tl.store(behind + place, coming.to(behind.dtype.element_ty), exist)
        total += tl.sum(coming, 0).to(tl.float64)
        product += tl.sum(coming * deviations, 0).to(tl.float64)
    _write(parts, 2 * tl.program_id(1), channels, width, total)
    _write(parts, 2 * tl.program_id(1) + 1, channels, width, product)


@triton.jit(do_not_specialize=("rows", "strips"))
def _gradient(
    x, gradient, d_x, statistics, gamma, beta, parts, d_gamma, d_beta, relu: tl.constexpr, rows,
    channels, strip, tile: tl.constexpr, width: tl.constexpr, inner: tl.constexpr,
    wide: tl.constexpr, strips, most: tl.constexpr,
):  # fmt: skip
    """The gradients of gamma and beta, from the sums of strips; that of x in a strip."""
    mean, scale, offset, low, rstd = _constants(statistics, gamma, beta, channels, width)
    total = tl.sum(_parts(parts, 0, channels, strips, most, width), 0)
    normalized = (tl.sum(_parts(parts, 1, channels, strips, most, width), 0) - low * total) * rstd
    if tl.program_id(1) == 0:
        _write(d_gamma, 0, channels, width, normalized)
        _write(d_beta, 0, channels, width, total)
    if d_x is not None:
        count = tl.cast(rows, tl.float64)
        factor = tl.where(rows > 1, scale, 0.0)  # of one value the output is beta, whatever it is
        share = normalized * rstd / count
        slope = (-factor * share).to(tl.float32)
        level = (factor * (low * share - total / count)).to(tl.float32)
        first = tl.program_id(1) * strip
        for start in range(first, min(first + strip, rows), tile):
            place, exist = _places(start, rows, channels, tile, width, inner, wide)
            deviations, coming = _tile(x, gradient, place, exist, mean, scale, offset, relu)
            values = coming * factor[None, :] + deviations * slope[None, :] + level[None, :]
            tl.store(d_x + place, values.to(d_x.dtype.element_ty), exist)


@triton.jit(do_not_specialize=("rows",))
def _normalize_part(
    x, output, statistics, gamma, beta, relu: tl.constexpr, rows, channels, strip,
    tile: tl.constexpr, width: tl.constexpr, inner: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """A strip, with statistics that are known."""
    mean, scale, offset, _, _ = _constants(statistics, gamma, beta, channels, width)
    first = tl.program_id(1) * strip
    for start in range(first, min(first + strip, rows), tile):
        place, exist = _places(start, rows, channels, tile, width, inner, wide)
        values = tl.load(x + place, exist, 0.0).to(tl.float32)
        values = (values - mean[None, :]) * scale[None, :] + offset[None, :]
        if relu:
            values = tl.where(values < 0, 0.0, values)
        tl.store(output + place, values.to(output.dtype.element_ty), exist)


@triton.jit(do_not_specialize=("rows",))
def _gradient_part(
    x, gradient, d_x, statistics, gamma, beta, means, relu: tl.constexpr, rows, channels, strip,
    tile: tl.constexpr, width: tl.constexpr, inner: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """The gradient of x in a strip, as in :func:`_gradient` with sums that are known."""
    mean, scale, offset, low, rstd = _constants(statistics, gamma, beta, channels, width)
    share = (_read(means, 0, channels, width, 0.0) * rstd).to(tl.float64)
    slope = (-scale * share).to(tl.float32)
    level = (scale * (low * share - _read(means, 1, channels, width, 0.0))).to(tl.float32)
    first = tl.program_id(1) * strip
    for start in range(first, min(first + strip, rows), tile):
        place, exist = _places(start, rows, channels, tile, width, inner, wide)
        deviations, coming = _tile(x, gradient, place, exist, mean, scale, offset, relu)
        values = coming * scale[None, :] + deviations * slope[None, :] + level[None, :]
        tl.store(d_x + place, values.to(d_x.dtype.element_ty), exist)
