"""Rules about batches, and about training against inference: TN108 to TN111."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from truenorm._diagnosis import remedies
from truenorm._diagnosis.averages import noticeable, output_error
from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.measuring import When
from truenorm._diagnosis.rule import Fault
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._records.moments import Array, Moments, Spread

EFFECTIVE = 12
"""Independent values per batch below which batches are too small. ImageNet error of ResNet50 with
32, 16, 8, 4 and 2 images per device: 23.6, 23.7, 24.8, 27.3, 34.7 % (Wu and He, 2018, "Group
Normalization", table 2): nothing lost at 16, a point at 8; this is between."""

SKEW = 0.25
"""Output error, of the whole way to a layer, above which it is given something else in inference
than in training."""

WORSE, SURE = 1.1, 3.0
"""One way to normalise is worse than another if its loss is a tenth higher, and by three standard
errors of the difference between paired batches."""

SETTLED = 1.25
"""Times the present skew that it would be after recalibration by the batches: from here on the
present statistics are the better ones, and only larger batches help."""

SORTED = 4.0
"""Variance of the batch means over that of mixed samples above which batches are no random samples:
of 16 batches each, chance makes it so in one of 200 data sets if all channels hang together (an F
distribution), and much more rarely if they do not."""

MIX = "shuffle the samples, all of them, before they are cut into batches"


def batch_too_small(facts: Facts) -> Iterator[Fault]:
    """TN108."""
    for layer, path in facts.layers.items():
        if path in facts.spread and layer not in facts.held:
            noise, together = _noise(facts, layer, path)
            if noise * EFFECTIVE > 1:
                evidence = {
                    "independent_values_per_batch": 1 / noise,
                    "batch_means_vary_by_std": float(np.sqrt(noise)),
                    "samples_per_batch": together,
                }
                enough = _enough(facts, layer, path)
                ghosts = getattr(layer, "virtual_batch_size", None) is not None
                larger = f"tn.BatchNormalization(virtual_batch_size={enough})"
                yield Fault(path, evidence, larger if ghosts else _batches_of(enough))


def _noise(facts: Facts, layer: BatchNormalizationLike, path: str) -> tuple[float, float]:
    """The variance of a batch mean over that of the values, and the samples that a batch is of."""
    seen = facts.seen.training
    samples = seen.samples / seen.batches
    together = min(samples, getattr(layer, "virtual_batch_size", None) or samples)
    return _between(facts.spread[path], seen.sites[path].variance) * samples / together, together


def _enough(facts: Facts, layer: BatchNormalizationLike, path: str) -> int:
    """Samples that make a batch large enough, in powers of two."""
    noise, together = _noise(facts, layer, path)
    return 2 ** math.ceil(math.log2(max(EFFECTIVE * noise, 1.0) * together))


def skew(facts: Facts) -> Iterator[Fault]:
    """TN109."""
    first = _skews(facts, facts.inference.inputs["in_inference"])
    if not any(error > SKEW for error in first.values()):
        return
    inputs = facts.answers.inputs
    now, then = (_skews(facts, inputs[when]) for when in ("in_inference", "recalibrated"))
    found = {path: error for path, error in now.items() if error > SKEW}
    if found and not recalibration_harms(facts):
        remedy = _against_skew(facts, max(found.values()), max(then.values()))
        for path, error in found.items():
            yield Fault(path, {"input_differs_by": error}, remedy)


def _skews(facts: Facts, inputs: Mapping[str, Moments]) -> dict[str, float]:
    """The output error that these inputs make with the statistics of those in training."""
    training = facts.seen.training.sites
    return {
        path: output_error(layer, moments.mean, moments.variance, inputs[path])
        for layer, path in facts.layers.items()
        if (moments := training.get(path)) is not None
    }


def _against_skew(facts: Facts, now: float, then: float) -> str:
    """What helps: statistics as they are taken by batches, or the population's, or neither."""
    if then <= SKEW:
        return remedies.recalibrate(facts)
    if then <= SETTLED * now:
        return remedies.recalibrate(facts, ', upstream="population"')
    paths = {layer: path for layer, path in facts.layers.items() if path in facts.spread}
    return _batches_of(max(_enough(facts, layer, path) for layer, path in paths.items()))


def _batches_of(samples: int) -> str:
    return f"model.fit(x, y, batch_size={samples})"


def otherwise_in_inference(facts: Facts) -> Iterator[Fault]:
    """TN110."""
    if not _differs(facts):
        return
    change = facts.answers.change
    if _differs(facts):  # of these answers, too: data may be others at each reading
        scores = {
            f"{name}_{when}": facts.score(when, name)
            for name in (facts.seen.scores if facts.scored else ())
            for when in _WHEN
        }
        evidence = {**scores, "outputs_differ_by": change}
        yield Fault(facts.model.name, evidence, _against_the_difference(facts))


def _differs(facts: Facts) -> bool:
    """Whether inference is worse than training; without a loss, whether it is another."""
    if facts.scored and len(facts.inference.sizes) > 1:
        return _is_worse(facts, "in_inference", "in_training")
    return facts.answers.change > noticeable(facts)


_WHEN: tuple[When, ...] = ("in_training", "in_inference", "recalibrated")


def _against_the_difference(facts: Facts) -> str:
    if not facts.scored or _is_worse(facts, "in_inference", "recalibrated"):
        return remedies.recalibrate(facts)
    return "tn.callbacks.FreezeStatistics(after_epoch=…) in model.fit, for its last epochs"


def not_random(facts: Facts) -> Iterator[Fault]:
    """TN111."""
    mixed, seen = facts.seen.shuffled, facts.seen.training
    if mixed is None:
        return
    path = next(iter(seen.sites))  # the first that is called: nothing has levelled the batches
    variance = seen.sites[path].variance
    ordered, shuffled = (_between(of.spread[path], variance) for of in (seen, mixed))
    if ordered > SORTED * shuffled:
        evidence = {
            "batch_means_vary_by_std": float(np.sqrt(ordered)),
            "mixed_they_would_by": float(np.sqrt(shuffled)),
        }
        yield Fault(path, evidence, MIX)


def recalibration_harms(facts: Facts) -> bool:
    """Whether the model works best with the statistics that it has, as far as the loss tells.

    So it is with one that has learned in inference mode, whatever its layers do by now.
    """
    return _is_worse(facts, "recalibrated", "in_inference")


def _is_worse(facts: Facts, one: When, other: When) -> bool:
    """Whether the loss is higher, beyond the batches' noise; False where there is none."""
    if not facts.seen.scores:
        return False
    answers = facts.answers if "recalibrated" in (one, other) else facts.inference
    if not facts.scored or len(answers.sizes) < 2:
        return False
    difference = facts.scores(one)["loss"] - facts.scores(other)["loss"]
    mean = float(np.average(difference, weights=answers.sizes))
    error = float(np.std(difference, ddof=1)) / np.sqrt(len(difference))
    return mean > SURE * error and mean > (WORSE - 1) * abs(facts.score(other, "loss"))


def _between(spread: Spread, variance: Array) -> float:
    """The variance of the batch means over that of the values, averaged over the channels."""
    varies = variance > 0
    per_batch = spread.means.count / np.maximum(spread.batches, 1)
    between = spread.means.m2 / np.maximum((spread.batches - 1) * per_batch, 1)
    return float(np.mean(between[varies] / variance[varies])) if varies.any() else 0.0
