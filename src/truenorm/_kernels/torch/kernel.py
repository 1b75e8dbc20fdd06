r"""PyTorch: passes of our own, compiled or by Triton; else native kernels around our statistics.

``torch.nn.functional.batch_norm`` adds float32 numbers one after the other, so that its mean of
100,000 values is off by 5e-6 standard deviations. Where the passes of ``passes.py`` cannot be used,
the same native kernel is asked for the statistics of groups of 2048 rows at most (a free view:
groups as channels), which are merged exactly (law of total variance) in float64. The native
inference kernel normalises with them, and the native training-mode backward, given these
statistics, is the closed form that differentiates through them. It keeps x, mean and rstd. A
derivative that shall be differentiated is made of PyTorch's operations.

The native kernel computes :math:`x \cdot a + (\beta - \mu a)` with :math:`a = \gamma / \sigma`: it
loses digits as :math:`|\mu| / \sigma` grows. Beyond a ratio of 8 the input is shifted by its mean
first: one more pass. On a GPU the question would stop the queue, so there it is always shifted.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from truenorm._kernels import composite
from truenorm._kernels.contract import Normalized, Options, Scalar, Tensor, Vector
from truenorm._kernels.masks import by_channel
from truenorm._kernels.torch import operators, passes, synchronized

MOST_GROUPS = 32  # These three weigh time against digits.
MOST_GROUPED_CHANNELS = 2**12  # More running sums than these do not stay in the cache.
FEWEST_GROUPED_ROWS = 32
MANY_ROWS = 2048  # Beyond them, sums in sequence show.
LARGEST_RATIO = 8.0

aten: Any = torch.ops.aten
isfinite, where = torch.isfinite, torch.where


def blend(old: Vector, value: Vector, momentum: Scalar) -> Vector:
    """One step of a moving average."""
    return torch.lerp(old, value, 1.0 - momentum)


def normalize(x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options) -> Normalized:
    """See :mod:`truenorm._kernels`.

    Who watches the operations gets the composite, which a compiler fuses; without the compiled
    passes so do masks, and batches of one value or none.
    """
    axis, epsilon, mask, moving, relu, add, correct = options
    if operators.takes(x, options):
        return operators.normalize(x, gamma, beta, options)
    several = mask is not None and by_channel(mask, axis)
    if add is not None and correct is not None:
        alone = normalize(x, gamma, beta, options._replace(relu=False, add=None))
        return composite.added_to(alone, options)
    if not several and passes.takes(x, mask, gamma, beta, add, *(moving[:2] if moving else ())):
        if mask is None:
            return passes.normalize(x, gamma, beta, options)
        last, mask = (values.movedim(axis, -1).contiguous() for values in (x, mask))
        add = None if add is None else add.movedim(axis, -1)
        options = options._replace(axis=-1, mask=mask, add=add)
        batch = passes.normalize(last, gamma, beta, options)
        return batch._replace(output=batch.output.movedim(-1, axis))
    channels = x.shape[axis]
    count = x.numel() // max(channels, 1)
    if (
        mask is not None
        or count < 2
        or not _has_native_kernels()
        or x.device.type not in ("cpu", "cuda")
        or passes.watched(x, gamma, beta)
    ):
        return composite.normalize(x, gamma, beta, options)
    if add is not None:
        alone = normalize(x, gamma, beta, options._replace(relu=False, add=None))
        return composite.added_to(alone, options)
    dtype = torch.promote_types(x.dtype, torch.float32)
    after = math.prod(x.shape[axis % x.dim() + 1 :])
    rows = x.reshape((-1, channels, after) if after > 1 else (-1, channels))
    mean, variance = _moments(rows.detach().to(dtype))
    delta = mean
    if x.device.type != "cpu" or not _near_zero(mean, variance, epsilon):
        first = rows.detach()[0].to(dtype).reshape(channels, -1)[:, 0]
        shift = where(isfinite(mean), mean, first)  # as in composite.py
        rows = rows.to(dtype) - (shift if after == 1 else shift[:, None])
        delta, variance = _moments(rows.detach())
        mean = shift + delta
    if correct is not None:
        gamma, beta = correct(Normalized(None, mean, variance, count), gamma, beta)
    scale = _parameter(gamma, 1.0, channels, dtype, x.device)
    offset = _parameter(beta, 0.0, channels, dtype, x.device)
    output = _Normalize.apply(rows, scale, offset, delta, variance, epsilon, relu)
    return Normalized(output.reshape(x.shape).to(x.dtype), mean, variance, count)


def brought(x: Tensor, mask: Tensor | None, beside: Tensor) -> tuple[Tensor, Tensor | None]:
    """Input and mask on the device of a weight, where Keras's operations take them, too.

    What lies on the meta device has a shape and no numbers (Keras would take what happens to lie in
    memory): no value of it counts.
    """
    if x.device == beside.device:
        return x, mask
    if x.is_meta:
        x = torch.zeros_like(x, device=beside.device)
        return x, x.new_zeros([1] * x.dim(), dtype=torch.bool)
    return x.to(beside.device), None if mask is None else mask.to(beside.device)


def infer(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mean: Vector,
    variance: Vector,
    options: Options,
) -> Tensor | None:
    """Normalise with given statistics in one pass; None where Keras's operations are for it.

    These are three passes here. A compiler fuses them, and an exporter shall see them; and they
    lose no digits where a mean is large, or in the gradients of gamma and beta.
    """
    axis, epsilon, _, _, relu, add, _ = options
    channels = x.shape[axis]
    learns = any(weight is not None and weight.requires_grad for weight in (gamma, beta))
    if (
        (learns and torch.is_grad_enabled())
        or x.device != mean.device
        or x.device.type not in ("cpu", "cuda")
        or not x.dtype.is_floating_point
        or x.numel() == 0
        or passes.watched(x, gamma, beta, mean, variance, add)
    ):
        return None
    given = (gamma, beta, mean, variance)
    learns = x.requires_grad or (add is not None and add.requires_grad)
    differentiated = learns and torch.is_grad_enabled()
    if not differentiated and x.is_cpu and passes.takes(x, None, *given, add):
        return passes.infer(x, *given, options)
    if not _has_native_kernels():
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Copies: autograd keeps them, and a training step writes to the variables in place.
    gamma, mean, variance = (
        None if value is None else value.to(dtype, copy=differentiated)
        for value in (gamma, mean, variance)
    )
    if x.device.type == "cpu" and not _near_zero(mean, variance, epsilon):
        return None
    scale = _parameter(gamma, 1.0, channels, dtype, x.device)
    offset = _parameter(beta, 0.0, channels, dtype, x.device)
    after = math.prod(x.shape[axis % x.dim() + 1 :])
    rows = x.reshape((-1, channels, after) if after > 1 else (-1, channels))
    output = torch.native_batch_norm(rows, scale, offset, mean, variance, False, 0.0, epsilon)[0]
    output = output.reshape(x.shape) if add is None else output.reshape(x.shape) + add
    return torch.relu(output) if relu else output


def _has_native_kernels() -> bool:
    """Whether this version of PyTorch has its own kernels under the names that are used here."""
    return (
        hasattr(torch, "native_batch_norm")
        and hasattr(torch, "batch_norm_update_stats")
        and hasattr(aten, "native_batch_norm_backward")
        and hasattr(aten, "threshold_backward")
    )


class _Normalize(torch.autograd.Function):
    """Normalise rows with their own statistics, which come along as constants.

    ReLU works in place, and its derivative reads the output, which the next layer keeps anyway.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        rows: Any, gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float, relu: bool
    ) -> Any:
        output = torch.native_batch_norm(rows, gamma, beta, mean, variance, False, 0.0, epsilon)[0]
        return output.relu_() if relu else output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rows, gamma, _, mean, variance, epsilon, relu = inputs
        rstd = torch.rsqrt(variance + epsilon)
        ctx.save_for_backward(rows, gamma, mean, rstd, *[output] * relu)
        ctx.epsilon = epsilon

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, gamma, mean, rstd, *rectified = ctx.saved_tensors
        for output in rectified:
            gradient = aten.threshold_backward(gradient, output, 0)
        gradient, needs = gradient.contiguous(), list(ctx.needs_input_grad[:3])
        kept = (gamma, mean, rstd)
        many = rows.dim() == 2 and len(rows) >= MANY_ROWS and rows.device.type == "cpu"
        if torch.is_grad_enabled():  # the native one has no right third derivative
            numbers = torch.stack([mean, rstd])
            given = (gradient, rows, gamma, None, None, numbers, 1, ctx.epsilon, False)
            gradients = passes.differentiable(*given)
        elif not (many and any(needs[1:])):
            gradients = _native_backward(gradient, rows, kept, ctx.epsilon, needs)
        else:
            gradients = _grouped_backward(gradient, rows, kept, ctx.epsilon, needs)
        return (*gradients, None, None, None, None)


def _native_backward(
    gradient: Tensor, rows: Tensor, kept: tuple[Vector, ...], epsilon: float, needs: list[bool]
) -> tuple[Tensor, Vector, Vector]:
    gamma, mean, rstd = kept
    return aten.native_batch_norm_backward(
        gradient, rows, gamma, None, None, mean, rstd, True, epsilon, needs
    )


def _grouped_backward(
    gradient: Tensor, rows: Tensor, kept: tuple[Vector, ...], epsilon: float, needs: list[bool]
) -> tuple[Tensor | None, Vector, Vector]:
    """With the sums over the rows in groups, as in :func:`_moments`."""
    sums = torch.zeros(2, rows.shape[1], dtype=torch.float64, device="cpu")
    for cut in _cuts(*rows.shape):
        _, *parts = _native_backward(
            _grouped(gradient, cut),
            _grouped(rows, cut),
            tuple(values.repeat(cut.groups) for values in kept),
            epsilon,
            [False, True, True],
        )
        sums += torch.stack(parts).reshape(2, cut.groups, -1).sum(1, dtype=sums.dtype)
    d_gamma, d_beta = sums.to(kept[0].dtype)
    if not needs[0]:
        return None, d_gamma, d_beta
    # As in closed_form.backward: dx = g scale + x slope + level.
    gamma, mean, rstd = kept
    scale = gamma * rstd
    slope = -scale * rstd * d_gamma / len(rows)
    level = -scale * d_beta / len(rows) - slope * mean
    d_rows = torch.addcmul(level, rows.to(level.dtype), slope)
    return d_rows.addcmul_(gradient, scale).to(rows.dtype), d_gamma, d_beta


def normalize_synchronized(
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    options: Options,
    *,
    over: object = None,
) -> Normalized:
    """See :mod:`truenorm._kernels`: over the processes of ``torch.distributed``."""
    del over  # JAX's devices have names.
    group = synchronized.group_of(x)
    if group is None:
        return normalize(x, gamma, beta, options)
    return synchronized.normalize(x, gamma, beta, options, group)


def _moments(rows: Tensor) -> tuple[Vector, Vector]:
    """Mean and population variance per channel, from those of groups of rows."""
    channels = rows.shape[1]
    if rows.dim() == 3 or rows.device.type != "cpu":
        return torch.batch_norm_update_stats(rows, None, None, 0.0)
    cuts = _cuts(len(rows), channels)
    found = [torch.batch_norm_update_stats(_grouped(rows, cut), None, None, 0.0) for cut in cuts]
    if len(cuts) == cuts[0].groups == 1:
        return found[0]
    means, variances = (
        torch.cat([part.reshape(-1, channels) for part in parts]).double()
        for parts in zip(*found, strict=True)
    )
    shares = [cut.rows / cut.groups / len(rows) for cut in cuts for _ in range(cut.groups)]
    weights = torch.tensor(shares, dtype=torch.float64, device="cpu")[:, None]
    mean = (means * weights).sum(0)
    variance = ((variances + means.sub_(mean).square_()) * weights).sum(0)
    return mean.to(rows.dtype), variance.to(rows.dtype)


class _Cut(NamedTuple):
    """Some of the rows, as groups of equal size."""

    start: int
    rows: int
    groups: int


@lru_cache(maxsize=1024)
def _cuts(rows: int, channels: int) -> list[_Cut]:
    """How rows are divided, so that no group is too long for a sum in sequence."""
    most = max(1, min(MOST_GROUPS, MOST_GROUPED_CHANNELS // channels))
    cuts, start = [], 0
    while start < rows:
        length = min(rows - start, most * MANY_ROWS)
        groups = max(1, min(most, length // FEWEST_GROUPED_ROWS))
        cuts.append(_Cut(start, length // groups * groups, groups))
        start += cuts[-1].rows
    return cuts


def _grouped(rows: Tensor, cut: _Cut) -> Tensor:
    """The rows of a cut, with the groups side by side as channels: a view."""
    part = rows[cut.start : cut.start + cut.rows]
    return part.reshape(-1, cut.groups * rows.shape[1])


def _near_zero(mean: Vector, variance: Vector, epsilon: float) -> bool:
    """Whether no mean is large against its standard deviation (a NaN counts as large)."""
    excess = mean.square().sub_(variance, alpha=LARGEST_RATIO**2).max()
    return bool(excess <= LARGEST_RATIO**2 * epsilon)


def _parameter(
    value: Vector | None, default: float, channels: int, dtype: Any, device: Any
) -> Vector:
    if value is None:
        return torch.full((channels,), default, dtype=dtype, device=device)
    return value.to(dtype)
