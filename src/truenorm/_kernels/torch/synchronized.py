# What it shares with passes.py is theirs alone.
# pyright: reportPrivateUsage=false
r"""PyTorch: one batch whose parts are those of several processes; one collective each way.

Each process takes count, mean and variance of its own part, and gets those of all parts, which it
merges by the law of total variance, in float64 and in the same order as all the others:

.. math:: w_r = \frac{n_r}{\sum_s n_s}, \qquad \mu = \sum_r w_r \mu_r, \qquad
          \sigma^2 = \sum_r w_r \left( \sigma_r^2 + (\mu_r - \mu)^2 \right) .

Backward it adds up two numbers per channel over all processes, the gradients of gamma and beta;
their means over the whole batch are all that the gradient of a part needs of the other parts (see
``closed_form.py``). Gamma's and beta's own gradients stay those of the part: who trains several
processes adds or averages them, as ``DistributedDataParallel`` does.

What is done value by value are halves of the passes of ``passes.py``; what they do not take, and a
derivative that shall be differentiated, is the composite's, with :func:`gather`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from truenorm._errors import DistributedError
from truenorm._kernels import composite
from truenorm._kernels.contract import Moving, Normalized, Options, Tensor, Vector
from truenorm._kernels.masks import by_channel
from truenorm._kernels.torch import passes
from truenorm._kernels.torch.passes import Plan


def group_of(x: Tensor) -> Any | None:
    """The processes that this tensor's batch is divided among; None if it is one's own.

    They are those of the ``DistributedDataParallel`` whose forward pass runs, or else all.
    """
    if x.is_meta or not (distributed.is_available() and distributed.is_initialized()):
        return None
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is not None:
        _check_join(wrapper)
    group = distributed.group.WORLD if wrapper is None else wrapper.process_group
    return group if distributed.get_world_size(group) > 1 else None


def _check_join(wrapper: Any) -> None:
    """A process that has run out of batches answers the wrapper's collectives, not a layer's."""
    settings = getattr(wrapper, "_join_config", None)
    if settings is not None and settings.enable and not settings.throw_on_early_termination:
        raise DistributedError(
            "Synchronized BatchNormalization cannot go on without the processes that have run out "
            "of batches, as join() would have it",
            expected="join(throw_on_early_termination=True), which ends with the first of them",
            received="join()",
            remedy="end so, or give the processes that have no batch one of no samples: x[:0]",
        )


def normalize(
    x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options, group: Any
) -> Normalized:
    """See :mod:`truenorm._kernels`: one batch of all processes of the group."""
    axis, epsilon, mask, moving, relu, _, correct = options
    several = mask is not None and by_channel(mask, axis)
    if several or not _takes(x, mask, gamma, beta, *(moving[:2] if moving else ())):
        if moving is not None and moving.domain is not None:
            _agree(gather(group)(torch.as_tensor(moving.domain, device=x.device).float().view(1)))
        return composite.normalize(x, gamma, beta, options, gather=gather(group))
    if mask is not None and axis % x.dim() != x.dim() - 1:
        last, mask = (values.movedim(axis, -1) for values in (x, mask))
        batch = normalize(last, gamma, beta, options._replace(axis=-1, mask=mask), group)
        return batch._replace(output=batch.output.movedim(-1, axis))
    if mask is not None:
        x, mask = x.contiguous(), mask.squeeze(-1).broadcast_to(x.shape[:-1]).contiguous()
    x, layout = passes._dense(x, axis)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Mean, variance, what rounding takes from the mean, rstd; and one over the count.
    rows = torch.empty(5, layout[1], dtype=wide, device=x.device)
    plan = Plan(layout, axis % x.dim(), epsilon, relu)
    halves: Any = passes._passes(x.device.type)
    count = layout[0] * layout[2] if mask is None else mask.sum()
    count = _merge(rows, count, halves.moments(plan, x.detach(), mask), moving, epsilon, group)
    if correct is not None:
        gamma, beta = correct(Normalized(None, rows[0], rows[1], count), gamma, beta)
    gamma, beta = passes._wide(gamma, wide), passes._wide(beta, wide)
    output = _Normalize.apply(x, gamma, beta, mask, rows, plan, group)
    return Normalized(output, rows[0], rows[1], count)


def _takes(x: Tensor, *others: Tensor | None) -> bool:
    """Also an empty part, wherever the others' are taken: all processes have to agree."""
    return passes.takes(x if x.numel() else x.new_empty(1), *others)


class _Normalize(torch.autograd.Function):
    """The output. Whole statistics are in ``rows``; the derivative goes through them."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, gamma: Any, beta: Any, mask: Any, rows: Any, plan: Plan, group: Any
    ) -> Any:
        halves: Any = passes._passes(x.device.type)
        ctx.halves, ctx.plan, ctx.group = halves, plan, group
        ctx.set_materialize_grads(False)
        # Beta only for ReLU's derivative: an optimizer may change it before the backward pass.
        ctx.save_for_backward(x, gamma, beta if plan.relu else None, mask, rows)
        return halves.normalize(plan, x, gamma, beta, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if gradient is None:
            return (None,) * 7
        kept = ctx.saved_tensors
        plain = passes._plain(kept[0].device, gradient, *kept) and not passes._batched(gradient)
        backward: Any = _backward if plain and not torch.is_grad_enabled() else _differentiable
        found = backward(ctx, gradient, *kept, ctx.needs_input_grad[:3])
        return *found, None, None, None, None


Gradients: TypeAlias = tuple[Tensor | None, Vector | None, Vector | None]


def _backward(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: Tensor | None,
    rows: Tensor,
    needed: tuple[bool, ...],
) -> Gradients:
    """The gradients of x, gamma and beta, as far as they are needed."""
    x, layout = passes._dense(x, ctx.plan.channel)  # Who keeps tensors may order them anew.
    plan = ctx.plan._replace(layout=layout)
    gradient = passes._as_laid_out(gradient, x)
    own = ctx.halves.products(plan, gradient, x, gamma, beta, rows)
    d_x = None
    if needed[0]:
        means = own.clone()
        _together(distributed.all_reduce, means, group=ctx.group)
        means *= rows[4]
        d_x = ctx.halves.gradient(plan, gradient, x, gamma, beta, mask, rows, means)
    return d_x, own[0] if needed[1] else None, own[1] if needed[2] else None


def _differentiable(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mask: Tensor | None,
    rows: Tensor,
    needed: tuple[bool, ...],
) -> Gradients:
    """The same by the composite, whose operations can be differentiated to any order."""
    if beta is None and needed[2]:
        beta = torch.zeros_like(rows[0], requires_grad=True)  # Its value is in no derivative.
    options = Options(
        ctx.plan.channel,
        ctx.plan.epsilon,
        None if mask is None else mask[..., None],
        Moving(rows[0], rows[1]),
        ctx.plan.relu,
    )
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        batch = composite.normalize(x, gamma, beta, options, gather=gather(ctx.group))
    wanted: Any = [part for part, needs in zip((x, gamma, beta), needed, strict=True) if needs]
    found = iter(torch.autograd.grad(batch.output, wanted, gradient, create_graph=again))
    d_x, d_gamma, d_beta = (next(found) if needs else None for needs in needed)
    return d_x, d_gamma, d_beta


def _merge(
    rows: Tensor, count: Any, own: Tensor, moving: Moving | None, epsilon: float, group: Any
) -> Tensor:
    """Write the whole batch's statistics to ``rows``, from count, mean and variance of a part.

    Returns:
        The whole batch's count.
    """
    channels = rows.shape[1]
    message = torch.empty(2 + 2 * channels, dtype=torch.float64, device=rows.device)
    message[0] = count
    message[1] = 0 if moving is None or moving.domain is None else moving.domain
    message[2:] = own.view(-1)
    parts = message.new_empty(distributed.get_world_size(group), len(message))
    _together(distributed.all_gather, list(parts.unbind()), message, group=group)
    counts, domains, means, variances = parts.split([1, 1, channels, channels], 1)
    total = counts.sum()
    share = 1.0 / total.clamp(min=1.0)
    weights = counts * share
    mean = (weights * means).sum(0)
    variance = (weights * ((means - mean).square_() + variances)).sum(0)
    if moving is not None:  # It normalises where nothing counts.
        mean, variance = (
            torch.where(total > 0, found, given.to(found.dtype))
            for found, given in zip((mean, variance), moving[:2], strict=True)
        )
    if moving is not None and moving.domain is not None:
        mean = torch.where(_agree(domains), mean, torch.nan)
    passes.write_statistics(rows, mean, variance, epsilon)
    rows[4] = share
    return total.to(rows.dtype)


def _agree(domains: Tensor) -> Tensor:
    """Whether all are the same; if not, an error where that need not be waited for."""
    same = (domains == domains[0]).all()
    if same.is_cpu and not same:
        raise DistributedError(
            "The processes of synchronized BatchNormalization are in different domains",
            expected="one domain for all of them in a call",
            received=f"domains {domains.int().flatten().tolist()}",
            remedy="give the domain of each sample, domain=..., in the call of the layer",
        )
    return same


def gather(group: Any) -> Callable[[Vector], Tensor]:
    """The composite's: from a vector to those of all processes of the group."""
    size, rank = distributed.get_world_size(group), distributed.get_rank(group)

    def rows(vector: Vector) -> Tensor:
        # As a sum of rows, each from one process, whose derivative is a sum, too.
        own = torch.zeros(size, len(vector), dtype=torch.bool, device=vector.device)
        own[rank] = True
        return _Sum.apply(torch.where(own, vector, vector.new_zeros(own.shape)), group)

    return rows


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group; so is its derivative, to any order."""

    @staticmethod
    def forward(ctx: Any, values: Any, group: Any) -> Any:
        ctx.group = group
        total = values.clone()
        _together(distributed.all_reduce, total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(gradient, ctx.group), None


def _together(collective: Callable[..., Any], *tensors: Any, group: Any) -> None:
    """Let all processes of the group meet, or say what it is that failed."""
    try:
        collective(*tensors, group=group)
    except RuntimeError as error:
        if "No backend type" in str(error):  # none for this device, which says nothing of others
            raise
        raise DistributedError(
            "Another process did not take part in synchronized BatchNormalization",
            expected=f"{distributed.get_world_size(group)} processes that call the layer, and its "
            "backward pass, equally often and in one order",
            received=str(error).partition("\n")[0].partition(". ")[0],
            remedy="see what the others say; a process without a batch has to give the layer one "
            "of no samples, x[:0]; how long to wait for the others is the timeout= of "
            "torch.distributed.init_process_group",
        ) from error
