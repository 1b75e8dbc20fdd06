"""Rules about the moving statistics: TN101 to TN107."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from truenorm._diagnosis import remedies
from truenorm._diagnosis.averages import Cause, Distance, is_untouched, off, output_error, stored
from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Fault, named
from truenorm._diagnosis.tn1_batches import recalibration_harms
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._layer.protocol import BatchNormalizationLike

RATIO = 1e3
"""|mean| in standard deviations above which E[x^2] - E[x]^2, which stock layers compute on PyTorch
and TensorFlow, keeps no digit in float32: its relative error is about 1.2e-7 * ratio^2."""

LARGEST = {"float16": 65504.0, "float32": 1e6, "bfloat16": 1e6, "float64": 1e12}
"""Mean plus three standard deviations that the compute dtype can still tell apart (float16: hold at
all): above it, neighbouring numbers are 0.06 apart in float32."""

NORMALIZE = "keras.layers.Normalization() before the model"


def never_updated(facts: Facts) -> Iterator[Fault]:
    """TN101."""
    untouched = {k: p for k, p in facts.layers.items() if is_untouched(k) and k not in facts.held}
    has_data = facts.lacks("data") is None
    if untouched and has_data and recalibration_harms(facts):
        return
    for layer, path in untouched.items():
        evidence = _distance(facts, layer, path) if has_data else {}
        remedy = remedies.recalibrate(facts)
        yield Fault(path, evidence or {"channels": _channels(layer)}, remedy)


def warming_up(facts: Facts) -> Iterator[Fault]:
    """TN102."""
    for path, one in _off(facts, "initial values"):
        evidence = {"initial_share": one.share, **_distance(facts, one.layer, path)}
        yield Fault(path, evidence, remedies.recalibrate(facts))


def not_of_the_data(facts: Facts) -> Iterator[Fault]:
    """TN103."""
    for path, one in _off(facts, "unknown"):
        evidence = {**_distance(facts, one.layer, path), "expected_by_chance": one.noise}
        yield Fault(path, evidence, remedies.recalibrate(facts))


def other_domain(facts: Facts) -> Iterator[Fault]:
    """TN104."""
    for path, one in _off(facts, "the data"):
        yield Fault(path, _distance(facts, one.layer, path), remedies.recalibrate(facts))


def not_numbers(facts: Facts) -> Iterator[Fault]:
    """TN105."""
    for layer, path in facts.layers.items():
        mean, variance = stored(layer)
        kinds = {
            "nan": np.isnan(mean) | np.isnan(variance),
            "infinite": np.isinf(mean) | np.isinf(variance),
            "negative_variances": variance < 0,
        }
        wrong = np.logical_or.reduce([*kinds.values()])
        if wrong.any():
            counts = {name: int(which.sum()) for name, which in kinds.items()}
            evidence = {**counts, **named(wrong)}
            yield Fault(path, evidence, remedies.recalibrate_alone(facts, layer))


def huge(facts: Facts) -> Iterator[Fault]:
    """TN106."""
    for layer, path in facts.layers.items():
        mean, variance = stored(layer)
        known = np.isfinite(mean) & np.isfinite(variance) & (variance >= 0)
        deviation = np.sqrt(np.where(known, variance, 0) + layer.epsilon)
        ratio = np.where(known, np.abs(mean) / deviation, 0)
        reach = np.where(known, np.abs(mean) + 3 * deviation, 0)
        lost = (ratio > RATIO) & _loses_digits(layer)
        far = reach > LARGEST.get(layer.compute_dtype, LARGEST["float32"])
        if (lost | far).any():
            evidence = {
                "out_of_reach": int((lost | far).sum()),
                **named(lost | far),
                "mean_in_std": float(ratio.max()),
                "largest_value": float(reach.max()),
            }
            exact = not far.any() and remedies.is_replaced(facts, layer)
            yield Fault(path, evidence, remedies.EXACT if exact else NORMALIZE)


def _loses_digits(layer: BatchNormalizationLike) -> bool:
    """Whether the variance is taken as a difference of squares, in float32 at most."""
    return layer.compute_dtype != "float64" and not isinstance(layer, BatchNormalization)


def updated_while_frozen(facts: Facts) -> Iterator[Fault]:
    """TN107."""
    layers = {path: layer for layer, path in facts.layers.items()}
    for surprise in facts.inspection.surprises:
        if surprise.code in ("parent_frozen_child_updates", "baked_false_ignored"):
            layer = layers[surprise.path.partition("#")[0]]
            yield Fault(surprise.path, {"cause": surprise.explanation}, remedies.hold(facts, layer))


def _off(facts: Facts, cause: Cause) -> Iterator[tuple[str, Distance]]:
    """The layers whose statistics are off for a reason, unless the model works best with them."""
    found = [(path, one) for path, one, of in off(facts) if of == cause]
    return iter(() if found and recalibration_harms(facts) else found)


def _distance(facts: Facts, layer: BatchNormalizationLike, path: str) -> Mapping[str, float]:
    if path not in facts.gaps:
        return {}
    gap = facts.gaps[path]
    error = output_error(layer, *stored(layer), facts.seen.training.sites[path])
    return {"mean_off_by_std": gap.mean, "scale_off_by_doublings": gap.scale, "output_error": error}


def _channels(layer: BatchNormalizationLike) -> int:
    return int(layer.moving_mean.shape[0])
