"""A training step of the layer on random data, dtypes, masks, axes and options, against float64.

A few examples in each run of all tests; hundreds with ``make random``. How far a number may be off
is what rounding explains: of the dtype that it is stored in, and of the float32 (or float64) in
which terms of a known size were added to it. Each channel is judged by its own scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import Drawn, Step, precision, rounded, train

from truenorm import BatchNormalization
from truenorm._kernels import reference
from truenorm._kernels.masks import lacking

EXAMPLES = 500 if settings.get_current_profile_name() == "random" else 12
SHARDS = 2
FEW = 16
"""Roundings of a sum: what the bounds are made of."""

ULP = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST, LARGEST = {"float16": 2.0**-24}, 65504.0
"""float16's least and greatest numbers; those of the others are far from all that is here."""

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"scale": False},
    {"center": False},
    {"activation": "relu"},
    {"renorm": True},
    {"momentum": None},
    {"bessel_correction": True},
    {"virtual_batch_size": 2},
    {"virtual_batch_size": 3, "activation": "relu"},
)


@dataclass(frozen=True)
class Random:
    """A training step: the layer's input, mask and options."""

    shape: tuple[int, ...]
    axis: int
    dtype: str
    deviation: float
    ratio: float
    mask: str
    density: float
    options: dict[str, Any] = field(hash=False)
    seed: int

    def draw(self) -> Drawn:
        """The arrays, exact in the dtype; means and deviations differ between channels."""
        rng = np.random.default_rng(self.seed)
        channels = self.shape[self.axis]
        deviation = self.deviation * rng.uniform(0.5, 2, channels)
        mean = np.clip(deviation * self.ratio * rng.choice([-1, 1], channels), -3e4, 3e4)
        stretch = [-1 if a == self.axis % len(self.shape) else 1 for a in range(len(self.shape))]
        x = rng.normal(size=self.shape) * deviation.reshape(stretch) + mean.reshape(stretch)
        parameters = (rng.uniform(0.5, 2, channels), rng.normal(size=channels))
        wanted = (self.options.get(name, True) for name in ("scale", "center"))
        gamma, beta = (p if want else None for p, want in zip(parameters, wanted, strict=True))
        arrays = (x, gamma, beta, rng.normal(size=self.shape))
        return Drawn(
            *(None if a is None else rounded(a, self.dtype) for a in arrays), self._mask(rng)
        )

    def _mask(self, rng: np.random.Generator) -> Any:
        if self.mask == "none":
            return None
        shape = np.delete(self.shape, self.axis if "rows" in self.mask else -1)
        if "stretched" in self.mask:
            shape[rng.integers(len(shape))] = 1
        return rng.random(shape) < self.density


@st.composite
def cases(draw: st.DrawFn) -> Random:
    """Shapes from one value to some ten thousand."""
    rank = draw(st.integers(2, 5))
    samples = draw(st.sampled_from([1, 2, 3, 8, 33, 200, *[1328] * (rank < 4)]))
    inner = draw(st.lists(st.integers(1, 7), min_size=rank - 1, max_size=rank - 1))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16", "float64"]))
    return Random(
        shape=(samples, *inner),
        axis=draw(st.integers(1 - rank, -1)),
        dtype=dtype,
        deviation=draw(st.sampled_from([1e-4, 1.0, 300.0])),
        ratio=draw(st.sampled_from([0.0, 1.0, 100.0, 1e4])),
        mask=draw(st.sampled_from(["none", "rows", "keras", "stretched rows", "stretched keras"])),
        density=draw(st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0])),
        options=draw(st.sampled_from(OPTIONS)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


WERE_WRONG = (
    # JAX: rows of 16 bits cast twice, so that the parts of their gradient were added in 16 bits.
    Random((1328, 6), -1, "bfloat16", 1.0, 100.0, "rows", 0.5, {}, 1),
    Random((2, 8, 7), -2, "float16", 1.0, 100.0, "rows", 0.5, {}, 1),
    # TensorFlow: the means of 664 ghost batches added one after the other.
    Random((1328, 2), -1, "float16", 1.0, 1e4, "none", 0.0, {"virtual_batch_size": 2}, 0),
)


@pytest.mark.parametrize("case", WERE_WRONG, ids=lambda case: case.dtype)
def test_what_was_wrong_once(case: Random) -> None:
    check(case)


@pytest.mark.parametrize("shard", range(SHARDS))
@settings(
    max_examples=EXAMPLES // SHARDS,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(cases())
def test_a_step_of_random_data(shard: int, case: Random) -> None:
    del shard
    check(case)


def check(case: Random) -> None:
    """Take the step, and compare all that comes out."""
    drawn = case.draw()
    policy = case.dtype if case.dtype in ("float32", "float64") else f"mixed_{case.dtype}"
    with precision(case.dtype):
        layer = BatchNormalization(axis=case.axis, dtype=policy, **case.options)
        found = train(layer, drawn, case.dtype)
    true, bounds = expected(case, drawn)
    names = ["output", "x", "gamma", "beta", "moving_mean", "moving_variance"]
    if case.options.get("renorm"):
        del names[4:]
    if layer.activation is not None and (np.abs(true.output) <= bounds.output).any():
        del names[1:4]  # which side of ReLU's corner a value is on, rounding decides
    for name in names:
        have, want, most = (getattr(step, name) for step in (found, true, bounds))
        if have is None:
            continue
        if name == "output" and layer.activation is not None:
            want = np.maximum(want, 0)
        if case.dtype == "float16" and name in ("output", "x"):
            have, want = (np.clip(values, -LARGEST, LARGEST) for values in (have, want))
        off = np.abs(have - want)
        wrong = ~(off <= most)
        assert not wrong.any(), f"{name}: off by {off[wrong]}, of which {most[wrong]} is rounding"


def expected(case: Random, drawn: Drawn) -> tuple[Step, Step]:
    """The right numbers, the output before ReLU, and how far each may be off."""
    axis = case.axis
    mask = np.ones(case.shape, bool)
    if drawn.mask is not None:
        aligned = np.expand_dims(drawn.mask, lacking(drawn.mask.shape, case.shape, axis)[0])
        mask = np.broadcast_to(aligned, case.shape)
    groups = max(1, case.shape[0] // case.options.get("virtual_batch_size", case.shape[0]))
    output, dx, output_bound, dx_bound = (np.zeros(case.shape) for _ in range(4))
    ghosts: list[_Ghost] = []
    for start in range(groups):
        part = np.s_[start::groups]
        pieces = (drawn.x[part], drawn.gradient[part], mask[part])
        ghost = _Ghost(case, *(np.moveaxis(a, axis, -1) for a in pieces), drawn)
        ghosts.append(ghost)
        for whole, rows in zip(
            (output, dx, output_bound, dx_bound),
            (ghost.output, ghost.dx, ghost.output_bound, ghost.dx_bound),
            strict=True,
        ):
            whole[part] = np.moveaxis(rows, -1, axis)
    sums = (sum(getattr(g, name) for g in ghosts) for name in ("gamma", "beta"))
    sum_bounds = (sum(getattr(g, name) for g in ghosts) for name in ("gamma_bound", "beta_bound"))
    statistics, statistics_bounds = _moved(case, ghosts)
    return (
        Step(output, dx, *sums, *statistics),
        Step(output_bound, dx_bound, *sum_bounds, *statistics_bounds),
    )


class _Ghost:
    """One ghost batch, or all of it, channels last: numbers, and bounds of what rounding does."""

    def __init__(self, case: Random, x: Any, gradient: Any, mask: Any, drawn: Drawn) -> None:
        self.unit = ULP["float64" if case.dtype == "float64" else "float32"]
        channels = x.shape[-1]
        gamma = np.ones(channels) if drawn.gamma is None else drawn.gamma
        beta = np.zeros(channels) if drawn.beta is None else drawn.beta
        zeros = np.zeros(channels)
        how: dict[str, Any] = {"mask": mask, "fallback": (zeros, zeros + 1)}
        batch = reference.forward(x, **how)
        self.mean, self.variance, self.count = batch.mean, batch.variance, batch.count
        r, d = np.ones(channels), zeros
        if case.options.get("renorm"):  # toward a mean of 0 and a deviation of 1
            r = np.where(self.count > 0, np.sqrt(self.variance + 1e-3), r)
            d = np.where(self.count > 0, self.mean, d)
        self.output = (batch.output * r + d) * gamma + beta
        if case.options.get("activation"):
            gradient = gradient * (self.output > 0)
        self.dx = reference.backward(gradient, x, gamma * r, **how).x
        rows = tuple(range(x.ndim - 1))
        self.gamma = (gradient * (batch.output * r + d)).sum(rows)
        self.beta = gradient.sum(rows)

        # Bounds. The mean may be off by a few roundings. What that is, is known to a few digits,
        # but not in float64: nothing is wider to add in, and errors grow with the number of values.
        rounding, smallest = ULP[case.dtype], SMALLEST.get(case.dtype, 0.0)
        double = case.dtype == "float64"
        few = (FEW + double * np.sqrt(x[..., 0].size)) * self.unit
        shift = few * np.abs(self.mean)
        lost = shift if double else few * shift
        rstd = np.where((self.count == 0) & self.count.any(), 0, 1 / np.sqrt(self.variance + 1e-3))
        deviations, push = np.abs(x - self.mean), np.abs(gradient)
        standard, relative = deviations * rstd, few + lost * rstd
        blur = standard.max(rows) * relative + lost * rstd
        counted = np.maximum(self.count, 1)
        terms = few * (gamma * np.abs(d) + np.abs(beta)) + gamma * r * blur
        self.output_bound = rounding * np.abs(self.output) + terms + smallest
        terms = relative * (push + push.sum(rows) / counted)
        terms += (standard + blur) * (push * blur).sum(rows) / counted
        terms += blur * (push * standard).sum(rows) / counted
        self.dx_bound = rounding * np.abs(self.dx) + gamma * r * rstd * terms + smallest
        self.gamma_bound = (push * (r * blur + few * np.abs(d))).sum(rows)
        self.beta_bound = few * push.sum(rows)
        counting = np.where(mask, deviations, 0)
        self.mean_bound = shift + few * counting.sum(rows) / counted
        terms = few * np.square(counting) + 2 * lost * counting
        self.variance_bound = terms.sum(rows) / counted + lost * shift


def _moved(case: Random, ghosts: list[_Ghost]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The moving statistics after the step from 0 and 1, and their bounds."""
    counts = np.array([ghost.count for ghost in ghosts])
    total, filled = counts.sum(0), (counts > 0).sum(0)
    weights = counts / np.maximum(total, 1)
    momentum = case.options.get("momentum", 0.99) or 0.0
    unbiased = case.options.get("bessel_correction") or momentum == 0
    factor = np.where(total > filled, total / np.maximum(total - filled, 1), 1) if unbiased else 1
    values, bounds = [], []
    for name, old, least, scale in (("mean", 0, 0, 1), ("variance", 1, filled, factor)):
        own, bound = (
            (weights * np.array([getattr(g, f"{name}{of}") for g in ghosts])).sum(0) * scale
            for of in ("", "_bound")
        )
        moved = np.where(total > least, momentum * old + (1 - momentum) * own, old)
        values.append(moved)
        bounds.append((1 - momentum) * bound + 4 * ghosts[0].unit * (np.abs(moved) + old))
    return (values[0], values[1]), (bounds[0], bounds[1])
