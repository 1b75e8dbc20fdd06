r"""Rules about the statistics: TN101 to TN110.

A layer that should normalise with the population's :math:`\mu, \sigma^2` and does so with the
stored :math:`m, v` gives, for a standardised value :math:`z = (x - \mu) / \tilde\sigma` with
:math:`\tilde\sigma^2 = \sigma^2 + \epsilon,\ \tilde v^2 = v + \epsilon`, an output that is off by

.. math:: \gamma \left( z \left(\frac{\tilde\sigma}{\tilde v} - 1\right)
          + \frac{\mu - m}{\tilde v} \right).

Its root mean square over the values and channels, over that of :math:`\gamma z`, is the *output
error*: 0 is right, 1 is as large as the output itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.measuring import Answers, Mode
from truenorm._diagnosis.rule import Fault
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._model.graph import is_site, nearby
from truenorm._model.values import as_float64
from truenorm._records.moments import Array, Moments

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

EFFECTIVE = 12
"""Independent values per batch below which batches are too small. ImageNet error of ResNet50 with
32, 16, 8, 4 and 2 images per device: 23.6, 23.7, 24.8, 27.3, 34.7 % (Wu and He, 2018, "Group
Normalization", table 2): nothing lost at 16, a point at 8; this is between."""

SKEW = 0.25
"""Output error, of the whole way to a layer, above which it is given something else in inference
than in training."""

WORSE, SURE = 1.1, 3.0
"""Inference is worse than training mode if its loss is a tenth higher, and by three standard errors
of the difference between paired batches."""

RATIO = 1e3
"""|mean| in standard deviations above which E[x^2] - E[x]^2, which stock layers compute on PyTorch
and TensorFlow, keeps no digit in float32: its relative error is about 1.2e-7 * ratio^2."""

LARGEST = {"float16": 65504.0, "float32": 1e6, "bfloat16": 1e6, "float64": 1e12}
"""Mean plus three standard deviations that the compute dtype can still tell apart (float16: hold at
all): above it, neighbouring numbers are 0.06 apart in float32."""

RECALIBRATE = "tn.recalibrate(model, data)"
EXACT = 'tn.replace(model, to="truenorm")'
NORMALIZE = "keras.layers.Normalization() before the model"

_NOISE = tuple(
    getattr(keras.layers, name)
    for name in dir(keras.layers)
    if name.startswith("Rand") or name.endswith(("Dropout", "GaussianNoise", "MixUp", "Mix"))
)
"""Layers that work in training only: Keras's by their names, since they have no common class."""


def output_error(layer: Any, mean: Array, variance: Array, right: Moments) -> float:
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


def stored(layer: Any) -> tuple[Array, Array]:
    """The moving mean and variance."""
    return as_float64(layer.moving_mean), as_float64(layer.moving_variance)


def _initial(layer: Any) -> tuple[Array, Array] | None:
    """What the moving statistics began with; None if it was drawn at random."""
    found: list[Array] = []
    for name in ("moving_mean", "moving_variance"):
        initializer = getattr(layer, f"{name}_initializer")
        if not isinstance(initializer, _CONSTANT):
            return None
        found.append(as_float64(initializer(getattr(layer, name).shape)))
    return found[0], found[1]


_CONSTANT = (
    keras.initializers.Zeros,
    keras.initializers.Ones,
    keras.initializers.Constant,
)


def is_untouched(layer: Any) -> bool:
    """Whether both moving statistics are exactly what they began with."""
    began = _initial(layer)
    return began is not None and all(map(np.array_equal, began, stored(layer)))


def never_updated(facts: Facts) -> Iterator[Fault]:
    """TN101."""
    for layer, path in facts.layers.items():
        if is_untouched(layer):
            evidence = {} if facts.lacks("data") else _distance(facts, layer, path)
            yield Fault(path, evidence or {"channels": _channels(layer)}, RECALIBRATE)


def warming_up(facts: Facts) -> Iterator[Fault]:
    """TN102."""
    for path, layer, share in _explained(facts):
        if share is not None:
            evidence = {"initial_share": share, **_distance(facts, layer, path)}
            yield Fault(path, evidence, RECALIBRATE)


def stale(facts: Facts) -> Iterator[Fault]:
    """TN103."""
    of_data = _of_data(facts)
    for path, layer, share in _explained(facts):
        if share is None and layer not in of_data:
            yield Fault(path, _distance(facts, layer, path), RECALIBRATE)


def other_domain(facts: Facts) -> Iterator[Fault]:
    """TN104."""
    of_data = _of_data(facts)
    for path, layer, share in _explained(facts):
        if share is None and layer in of_data:
            yield Fault(path, _distance(facts, layer, path), RECALIBRATE)


def not_numbers(facts: Facts) -> Iterator[Fault]:
    """TN105."""
    for layer, path in facts.layers.items():
        mean, variance = stored(layer)
        counts = {
            "nan": int((np.isnan(mean) | np.isnan(variance)).sum()),
            "infinite": int((np.isinf(mean) | np.isinf(variance)).sum()),
            "negative_variances": int((variance < 0).sum()),
        }
        if any(counts.values()):
            evidence = {**counts, "channels": _channels(layer)}
            yield Fault(path, evidence, RECALIBRATE)


def huge(facts: Facts) -> Iterator[Fault]:
    """TN106."""
    for layer, path in facts.layers.items():
        mean, variance = stored(layer)
        known = np.isfinite(mean) & np.isfinite(variance) & (variance >= 0)
        deviation = np.sqrt(np.where(known, variance, 0) + layer.epsilon)
        ratio = np.where(known, np.abs(mean) / deviation, 0)
        reach = np.where(known, np.abs(mean) + 3 * deviation, 0)
        lost = (ratio > RATIO) & _loses_digits(layer)
        bad = lost | (reach > LARGEST.get(layer.compute_dtype, LARGEST["float32"]))
        if bad.any():
            evidence = {
                "out_of_reach": int(bad.sum()),
                "channels": bad.size,
                "mean_in_std": float(ratio.max()),
                "largest_value": float(reach.max()),
            }
            yield Fault(path, evidence, EXACT if lost.any() else NORMALIZE)


def _loses_digits(layer: Any) -> bool:
    """Whether the variance is taken as a difference of squares, in float32 at most."""
    return layer.compute_dtype != "float64" and not isinstance(layer, BatchNormalization)


def updated_while_frozen(facts: Facts) -> Iterator[Fault]:
    """TN107."""
    for surprise in facts.inspection.surprises:
        if surprise.code in ("parent_frozen_child_updates", "baked_false_ignored"):
            evidence = {"cause": surprise.explanation}
            yield Fault(surprise.path, evidence, 'tn.freeze(model, "statistics")')


def batch_too_small(facts: Facts) -> Iterator[Fault]:
    """TN108."""
    seen = facts.seen
    samples = seen.training.samples / seen.training.batches
    for layer, path in facts.layers.items():
        if path not in seen.means:
            continue
        variance = seen.training.sites[path].variance
        varies = variance > 0
        if not varies.any():
            continue
        between = seen.means[path].m2 / (seen.full_batches - 1)
        together = min(samples, getattr(layer, "virtual_batch_size", None) or samples)
        noise = float(np.mean(between[varies] / variance[varies])) * samples / together
        if noise * EFFECTIVE > 1:
            evidence = {
                "independent_values_per_batch": 1 / noise,
                "batch_means_vary_by_std": float(np.sqrt(noise)),
                "samples_per_batch": together,
            }
            yield Fault(path, evidence, "model.fit(x, y, batch_size=32)")


def skew(facts: Facts) -> Iterator[Fault]:
    """TN109."""
    for layer, path in facts.layers.items():
        if path in facts.seen.training.sites:
            training, inference = (
                of.sites[path] for of in (facts.seen.training, facts.seen.inference)
            )
            error = output_error(layer, training.mean, training.variance, inference)
            if error > SKEW:
                yield Fault(path, {"input_differs_by": error}, RECALIBRATE)


def otherwise_in_inference(facts: Facts) -> Iterator[Fault]:
    """TN110."""
    answers = facts.answers
    if len(answers.sizes) > 1 and answers.scores:
        bad = _is_worse(answers)
    else:
        bad = answers.change > _noticeable(facts)
    if bad:
        scores = {
            f"{name}_{when}": answers.score(mode, name)
            for name in answers.scores.get("moving", ())
            for mode, when in _WHEN.items()
        }
        evidence = {**scores, "outputs_differ_by": answers.change}
        yield Fault(facts.model.name, evidence, RECALIBRATE)


_WHEN: dict[Mode, str] = {
    "batch": "in_training",
    "moving": "in_inference",
    "population": "recalibrated",
}


def _is_worse(answers: Answers) -> bool:
    """Whether the loss in inference is above that in training mode, beyond the batches' noise."""
    training, inference = (answers.scores[mode]["loss"] for mode in ("batch", "moving"))
    difference = float(np.average(inference - training, weights=answers.sizes))
    error = float(np.std(inference - training, ddof=1)) / np.sqrt(len(training))
    tenth = (WORSE - 1) * abs(answers.score("batch", "loss"))
    return difference > SURE * error and difference > tenth


def _noticeable(facts: Facts) -> float:
    return max(OFF, SAMPLING / np.sqrt(facts.seen.training.samples))


def _explained(facts: Facts) -> Iterator[tuple[str, Any, float | None]]:
    """The layers whose moving statistics are not the population's, and their initial share.

    A moving average that has just begun has begun everywhere; new layers come after old ones. So
    initial values explain nothing if they do not explain the first layer's gap, or if the layers
    after it hold nothing of theirs: then it is the data that is another.
    """
    off: dict[str, tuple[Any, float | None]] = {}
    first, after = _first(facts), list[float]()
    for layer, path in facts.layers.items():
        if path in facts.seen.training.sites and not is_untouched(layer):
            moments = facts.seen.training.sites[path]
            share, explains = _initial_share(facts, layer, moments)
            if layer not in first:
                after.append(share)
            if output_error(layer, *stored(layer), moments) > _noticeable(facts):
                off[path] = layer, share if explains else None
    of_first = [share for layer, share in off.values() if layer in first]
    otherwise = any(
        share is None
        or (share > PLAIN_SHARE and after != [] and float(np.median(after)) < share / 2)
        for share in of_first
    )
    for path, (layer, share) in off.items():
        yield path, layer, None if otherwise else share


def _distance(facts: Facts, layer: Any, path: str) -> dict[str, float]:
    if path not in facts.gaps:
        return {}
    gap = facts.gaps[path]
    error = output_error(layer, *stored(layer), facts.seen.training.sites[path])
    return {"mean_off_by_std": gap.mean, "scale_off_by_doublings": gap.scale, "output_error": error}


def _initial_share(facts: Facts, layer: Any, moments: Moments) -> tuple[float, bool]:
    r"""The share of the initial values in the moving statistics, and whether it explains the gap.

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
    most = min(1.0, 2 * layer.momentum**facts.steps) if facts.steps else layer.momentum
    return share, share < most and product > WARMING * length * float(np.linalg.norm(now))


def _first(facts: Facts) -> set[Any]:
    """The layers with no BatchNormalization before them: what they see is the data's doing."""
    if not facts.graph:
        return set()
    later = {site.operation for site in facts.sites if any(map(is_site, nearby(site)))}
    return {site.operation for site in facts.sites} - later


def _of_data(facts: Facts) -> set[Any]:
    """The first layers that see the data as in training: nothing before them works only there."""
    first = _first(facts)
    noisy = {
        site.operation
        for site in (facts.sites if first else ())
        if any(isinstance(call.operation, _NOISE) for call in nearby(site))
    }
    return first - noisy


def _channels(layer: Any) -> int:
    return int(layer.moving_mean.shape[0])
