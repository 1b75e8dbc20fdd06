r"""How far moving statistics are from those of the data, and what can have made them so.

A layer that should normalise with the population's :math:`\mu, \sigma^2` and does so with the
stored :math:`m, v` gives, for a standardised value :math:`z = (x - \mu) / \tilde\sigma` with
:math:`\tilde\sigma^2 = \sigma^2 + \epsilon,\ \tilde v^2 = v + \epsilon`, an output that is off by

.. math:: \gamma \left( z \left(\frac{\tilde\sigma}{\tilde v} - 1\right)
          + \frac{\mu - m}{\tilde v} \right).

Its root mean square over the values and channels, over that of :math:`\gamma z`, is the *output
error*: 0 is right, 1 is as large as the output itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np

from truenorm._diagnosis.facts import Facts
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.graph import is_site, nearby
from truenorm._model.values import as_float64
from truenorm._records.moments import Array, Moments

Cause = Literal["initial values", "the data", "unknown"]

OFF = 0.1
"""Output error above which statistics are not those of the data. The moving average of a training
that has come to rest is noisier than the population by about 0.07 standard deviations of a batch
mean (momentum 0.99: sqrt((1 - 0.99) / (1 + 0.99))), which is below 0.03 for batches of 8."""

SAMPLING = 3.0
"""Standard errors of the data's own mean: over N samples it is off by at most 1 / sqrt(N) standard
deviations (one sigma), however the values within a sample hang together."""

WARMING = 0.9
"""Cosine between 'population to initial value' and 'population to moving statistics' above which
the initial values are what the moving statistics still hold: they then explain 81 % of the gap."""

PLAIN_SHARE = 0.1
"""Initial share above which it can be told from noise in other layers too."""

NOISE = 3.0
"""Times its standard deviation that a moving average may be off by chance."""

WIDER = 4.0
"""Times the variance of the data that a moving variance cannot have by its batches' chance."""

RIGHT = 0.5
"""Share of the first layers' error below which the layers after them are right in comparison."""

_INITIAL = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)

_NOISE = tuple(
    getattr(keras.layers, name)
    for name in dir(keras.layers)
    if name.startswith("Rand") or name.endswith(("Dropout", "GaussianNoise", "MixUp", "Mix"))
)
"""Layers that work in training only: Keras's by their names, since they have no common class."""


@dataclass(frozen=True)
class Distance:
    """How far a layer's moving statistics are from the population's.

    Args:
        layer: The layer.
        error: The output error.
        noise: The output error to be expected of its moving average over these batches: by chance,
            and because the variance of a batch lacks that of the batch means.
        share: How much of the initial values the moving statistics hold, at the best guess.
        begun: Whether that explains the error.
    """

    layer: BatchNormalizationLike
    error: float
    noise: float
    share: float
    begun: bool


def output_error(
    layer: BatchNormalizationLike, mean: Array, variance: Array, right: Moments
) -> float:
    """Root mean square error of a layer's output, in units of the output (see the file's head)."""
    deviation = np.sqrt(right.variance + layer.epsilon)
    with np.errstate(invalid="ignore", divide="ignore"):  # stored variances may be anything
        used = np.sqrt(variance + layer.epsilon)
        share = right.variance / np.square(deviation)
        squares = share * np.square(deviation / used - 1) + np.square((right.mean - mean) / used)
    weight = np.ones_like(mean) if layer.gamma is None else np.square(as_float64(layer.gamma))
    has_output = deviation > 0  # a constant channel without epsilon is 0 / 0
    weight, share, squares = weight[has_output], share[has_output], squares[has_output]
    total = float((weight * share).sum())
    return float(np.sqrt((weight * squares).sum() / total)) if total > 0 else 0.0


def stored(layer: BatchNormalizationLike) -> tuple[Array, Array]:
    """The moving mean and variance."""
    return as_float64(layer.moving_mean), as_float64(layer.moving_variance)


def is_untouched(layer: BatchNormalizationLike) -> bool:
    """Whether both moving statistics are exactly what they began with."""
    began = _initial(layer)
    return began is not None and all(map(np.array_equal, began, stored(layer)))


def noticeable(facts: Facts) -> float:
    """The output error from which it is more than the data's own chance."""
    return max(OFF, SAMPLING / np.sqrt(facts.seen.training.samples))


def off(facts: Facts) -> Iterator[tuple[str, Distance, Cause]]:
    """The layers that learn from batches and whose statistics are not the population's; and why.

    A moving average that has just begun has begun everywhere; new layers come after old ones. So
    initial values explain nothing if they do not explain the first layer's error, or if the layers
    after it hold nothing of theirs: then it is something else.
    """
    first = _first(facts)
    distances = {
        path: _distance(facts, layer, path)
        for layer, path in facts.layers.items()
        if path in facts.seen.training.sites and layer not in facts.held and not is_untouched(layer)
    }
    later = [one for one in distances.values() if one.layer not in first]
    wrong = {path: one for path, one in distances.items() if one.error > noticeable(facts)}
    begun = all(_has_begun(one, later) for one in wrong.values() if one.layer in first)
    for path, one in wrong.items():
        if one.begun and begun:
            yield path, one, "initial values"
        elif one.layer in first and _is_of_data(facts, path, one, later):
            yield path, one, "the data"
        else:
            yield path, one, "unknown"


def _distance(facts: Facts, layer: BatchNormalizationLike, path: str) -> Distance:
    moments = facts.seen.training.sites[path]
    error = output_error(layer, *stored(layer), moments)
    return Distance(
        layer, error, _noise(facts, layer, path), *_initial_share(facts, layer, moments)
    )


def _has_begun(one: Distance, later: Sequence[Distance]) -> bool:
    """Whether the initial values in a first layer are those of a moving average that has begun."""
    alike = not later or float(np.median([k.share for k in later])) >= one.share / 2
    return one.begun and (one.share <= PLAIN_SHARE or alike)


def _noise(facts: Facts, layer: BatchNormalizationLike, path: str) -> float:
    r"""The output error of a moving average over these batches that has come to rest.

    Its standard deviation is :math:`\sqrt{(1 - \alpha) / (1 + \alpha)}` of that of one batch.
    """
    moments, spread = facts.seen.training.sites[path], facts.seen.training.spread[path]
    below = np.maximum(spread.batches - 1, 1)
    per_batch = moments.count / np.maximum(spread.batches, 1)
    mean, variance = (
        np.sqrt(_averaged(layer) * one.m2 / below / np.maximum(per_batch, 1))
        for one in (spread.means, spread.variances)
    )
    least = np.maximum(spread.variances.mean - variance, 0)
    return output_error(layer, moments.mean + mean, least, moments)


def _averaged(layer: BatchNormalizationLike) -> float:
    r"""Sum of the squared weights of batches in a moving average."""
    return 0.0 if layer.momentum is None else (1 - layer.momentum) / (1 + layer.momentum)


def _is_of_data(facts: Facts, path: str, one: Distance, later: Sequence[Distance]) -> bool:
    r"""Whether only other data can be the cause: not the batches' chance, nor weights that moved.

    In whatever order the samples came: with weights :math:`w_i` of the sum 1 a mean of :math:`N`
    samples is at most :math:`\sigma \sqrt{N \sum_i w_i^2}` from that of all (Cauchy and Schwarz).
    Small batches have small variances; so only a moving variance that is too large tells anything.
    """
    before = [c for site in facts.sites if site.operation is one.layer for c in nearby(site)]
    if any(isinstance(call.operation, _NOISE) for call in before) or one.error < NOISE * one.noise:
        return False
    moments, (mean, variance) = facts.seen.training.sites[path], stored(one.layer)
    reach = facts.seen.training.batches * _averaged(one.layer)
    with np.errstate(invalid="ignore", divide="ignore"):  # stored variances may be anything
        shift = np.abs(mean - moments.mean) / np.sqrt(moments.variance + one.layer.epsilon)
        scale = (variance + one.layer.epsilon) / (moments.variance + one.layer.epsilon)
    by_chance = np.sqrt(reach) + SAMPLING / np.sqrt(facts.seen.training.samples)
    if not ((shift > by_chance).any() or np.median(scale) > WIDER * max(1.0, reach)):
        return False
    learns = any(getattr(call.operation, "trainable_variables", ()) for call in before)
    right = later != [] and float(np.median([k.error for k in later])) < RIGHT * one.error
    return right or not learns


def _initial(layer: BatchNormalizationLike) -> tuple[Array, Array] | None:
    """What the moving statistics began with; None if it was drawn at random."""
    found: list[Array] = []
    for name in ("moving_mean", "moving_variance"):
        initializer = getattr(layer, f"{name}_initializer")
        if not isinstance(initializer, _INITIAL):
            return None
        found.append(as_float64(initializer(getattr(layer, name).shape)))
    return found[0], found[1]


def _initial_share(
    facts: Facts, layer: BatchNormalizationLike, moments: Moments
) -> tuple[float, bool]:
    r"""The share of the initial values in the moving statistics, and whether it explains the error.

    A moving average that began with :math:`s_0` and averages :math:`s` holds
    :math:`w s_0 + (1 - w) s`, with one :math:`w` for all channels: here the least-squares solution.
    After :math:`n` steps it is momentum to the power of :math:`n`; the optimizer has counted so
    many at least, and one was made.
    """
    began = _initial(layer)
    if began is None or layer.momentum is None:
        return 0.0, False
    known = moments.variance + layer.epsilon > 0
    center, variation = moments.mean[known], moments.variance[known]
    scale = np.sqrt(variation + layer.epsilon)

    def away(mean: Array, variance: Array) -> Array:
        means, variances = mean[known] - center, variance[known] - variation
        return np.concatenate([means / scale, variances / np.square(scale)])

    origin, now = away(*began), away(*stored(layer))
    product, length = float(origin @ now), float(np.linalg.norm(origin))
    if not length > 0:
        return 0.0, False
    share = product / length**2
    steps = facts.steps // getattr(layer, "accumulation_steps", 1)
    most = min(1.0, 2 * layer.momentum**steps) if steps else layer.momentum
    return share, share < most and product > WARMING * length * float(np.linalg.norm(now))


def _first(facts: Facts) -> set[Any]:
    """The layers with no BatchNormalization before them; none where there is no graph."""
    later = {site.operation for site in facts.sites if any(map(is_site, nearby(site)))}
    return {site.operation for site in facts.sites} - later
