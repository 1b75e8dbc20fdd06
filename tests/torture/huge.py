"""Arrays of more than 2^31 elements: ``KERAS_BACKEND=torch python tests/torture/huge.py``.

One layer, forward and backward by the compiled passes, and the sums that ``collect`` takes, in
bfloat16 with channels last and first. The last of 33 images lies beyond element 2^31 altogether,
and its numbers are unlike the others': whoever leaves it out, or counts in 32 bits, is seen.
Compared is with float64 arithmetic, image by image; outputs and gradients at places drawn over all
of the array, in its last image, and around element 2^31. It takes 15 GiB of memory, some minutes.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any, NamedTuple

import keras
import numpy as np
import torch

import truenorm as tn
from truenorm._kernels.sums import batch_sums
from truenorm._kernels.torch.passes import takes

IMAGES, SIDE, CHANNELS, LIMIT = 33, 1024, 64, 2**31
IMAGE = SIDE * SIDE * CHANNELS
EPSILON, PLACES = 1e-3, 20_000
ROUNDING, SMALL = 2.0**-8, 1e-5  # half a unit in the last place of bfloat16; of float32 sums


class Sums(NamedTuple):
    """Of an array, per channel, in float64."""

    mean: Any
    variance: Any


def fill(x: Any, axis: int, seed: int) -> None:
    """Numbers that depend on image, place and channel; the last image's mean is another."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.arange(CHANNELS, dtype=torch.float32)
    scale, mean = 1 + channel / CHANNELS, channel / 16 - 2
    if axis == 1:
        scale, mean = scale[:, None, None], mean[:, None, None]
    noise = torch.randn(x.shape[1:], generator=generator)
    for number, image in enumerate(x):
        shift = int(torch.randint(IMAGE, (), generator=generator))
        values = noise.view(-1).roll(shift).view(noise.shape)
        image.copy_(values * scale + mean + (20.0 if number == IMAGES - 1 else 0.0))


def by_channel(image: Any, axis: int) -> Any:
    """An image in float64 as (channels, values)."""
    last = image if axis == -1 else image.movedim(0, -1)
    return last.reshape(-1, CHANNELS).to(torch.float64).T


def moments(x: Any, axis: int) -> Sums:
    """Mean and variance, each in a pass of its own."""
    count = x.numel() // CHANNELS
    mean = sum(by_channel(image, axis).sum(1) for image in x) / count
    squares = sum((by_channel(image, axis) - mean[:, None]).square().sum(1) for image in x)
    return Sums(mean, squares / count)


def places(shape: Any, axis: int) -> tuple[tuple[Any, ...], Any]:
    """Indices all over, in the last image and around the limit; and the channel of each."""
    random, total = np.random.default_rng(0), IMAGES * IMAGE
    flat = np.concatenate([
        random.integers(0, total, PLACES),
        random.integers(LIMIT, total, PLACES),
        np.arange(LIMIT - 100, LIMIT + 100),
        np.arange(total - 100, total),
    ])  # fmt: skip
    index = tuple(map(torch.from_numpy, np.unravel_index(flat, shape)))
    return index, index[axis]


def wrong(name: str, got: Any, wanted: Any, bound: Any) -> int:
    """How many are further off than they may be; the largest error in parts of the bound."""
    parts = (got.to(torch.float64) - wanted).abs() / bound
    print(f"  {name:22} {len(parts):6} values, {parts.max().item():.2f} of what rounding may do")
    return int((~(parts <= 1)).sum())


def one(axis: int) -> int:
    """One order of the axes; how many values were wrong."""
    order = (SIDE, SIDE, CHANNELS) if axis == -1 else (CHANNELS, SIDE, SIDE)
    x = torch.empty((IMAGES, *order), dtype=torch.bfloat16)
    fill(x, axis, seed=0)
    assert x.numel() > LIMIT
    assert takes(x)
    print(f"{tuple(x.shape)}, {x.numel():,} elements, channels {'last' if axis == -1 else 'first'}")
    truth, (index, channel) = moments(x, axis), places(x.shape, axis)
    bad = 0
    if axis == -1:  # the sums of another order would need a copy of the array
        count, (shift, first, second) = batch_sums(x, axis=axis)
        mean = shift + first / count
        variance = second / count - (first / count) ** 2
        bad += wrong("collect: mean", mean, truth.mean, 1e-6 * truth.variance.sqrt())
        bad += wrong("collect: variance", variance, truth.variance, 1e-5 * truth.variance)

    layer: Any = tn.BatchNormalization(
        axis=axis, epsilon=EPSILON, momentum=0.0, dtype="mixed_bfloat16"
    )
    layer.build(x.shape)
    assert layer.compute_dtype == "bfloat16"
    gamma = torch.linspace(0.5, 1.5, CHANNELS, dtype=torch.float64)
    beta = torch.linspace(-1, 1, CHANNELS, dtype=torch.float64)
    layer.gamma.assign(gamma.numpy())
    layer.beta.assign(beta.numpy())
    gamma, beta = (w.value.detach().to(torch.float64) for w in (layer.gamma, layer.beta))

    start = time.perf_counter()
    y = layer(x.requires_grad_(), training=True)
    print(f"  forward {time.perf_counter() - start:.1f} s")
    x_grad, x = x, x.detach()  # of the same memory
    rstd = (truth.variance + EPSILON).rsqrt()
    normal = (x[index].to(torch.float64) - truth.mean[channel]) * rstd[channel]
    wanted = normal * gamma[channel] + beta[channel]
    bad += wrong("output", y.detach()[index], wanted, ROUNDING * wanted.abs() + SMALL)
    moved = [w.value.detach() for w in (layer.moving_mean, layer.moving_variance)]
    bad += wrong("mean", moved[0], truth.mean, 1e-5 * truth.variance.sqrt())
    bad += wrong("variance", moved[1], truth.variance, 1e-5 * truth.variance)

    upstream = y.detach()  # the output's memory once more: there is not enough for another
    fill(upstream, axis, seed=1)
    start = time.perf_counter()
    y.backward(upstream)
    print(f"  backward {time.perf_counter() - start:.1f} s")
    d_beta, d_gamma = sums_of_gradients(upstream, x, axis, truth)
    above, count = upstream[index].to(torch.float64), x.numel() // CHANNELS
    wanted = above - (d_beta / count)[channel] - normal * (d_gamma / count)[channel]
    wanted *= (gamma * rstd)[channel]
    bad += wrong("gradient of x", x_grad.grad[index], wanted, ROUNDING * wanted.abs() + SMALL)
    for name, weight, sums in (("gamma", layer.gamma, d_gamma), ("beta", layer.beta, d_beta)):
        bad += wrong(f"gradient of {name}", weight.value.grad, sums, 1e-5 * sums.abs().max())
    return bad


def sums_of_gradients(upstream: Any, x: Any, axis: int, truth: Sums) -> tuple[Any, Any]:
    """The gradients of beta and gamma."""
    rstd = (truth.variance + EPSILON).rsqrt()
    d_beta = d_gamma = torch.zeros(CHANNELS, dtype=torch.float64)
    for image, gradient in zip(x, upstream, strict=True):
        above = by_channel(gradient, axis)
        d_beta = d_beta + above.sum(1)
        normal = (by_channel(image, axis) - truth.mean[:, None]) * rstd[:, None]
        d_gamma = d_gamma + (above * normal).sum(1)
    return d_beta, d_gamma


def main() -> int:
    """Both orders; 1 if a value was wrong."""
    assert keras.config.backend() == "torch"
    bad = one(-1) + one(1)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{bad} values wrong; {most:.1f} GiB of memory at most")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
