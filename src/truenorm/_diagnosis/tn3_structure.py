"""Rules about where BatchNormalization is, and how it is trained: TN301 to TN310."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from truenorm._diagnosis import remedies
from truenorm._diagnosis.averages import is_untouched, noticeable, output_error, stored
from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Fault
from truenorm._diagnosis.tn1_batches import SKEW, recalibration_harms
from truenorm._model.graph import Call, is_site, nearby
from truenorm._model.sites import channel_axis, channel_axis_of, is_activation, is_linear, position
from truenorm._records.moments import Moments

MOST = 0.5
"""Share of the hidden convolution and dense layers that must have a BatchNormalization for one
without it to look forgotten."""

SMALLEST_RATE = 0.1
"""Dropout rate from which the variance shift is told: the variance that BatchNormalization sees in
inference is then (1 - rate) of that in training (at mean 0), its output 5 % off in scale."""

FREE = 0.5
"""Share of the output error that dropout makes, at mean 0, up to which statistics have been taken
without it, however few the samples."""

_DROPOUT = (keras.layers.Dropout, keras.layers.GaussianDropout)


def without(facts: Facts) -> Iterator[Fault]:
    """TN301."""
    hidden = [c for c in facts.calls if is_linear(c) and not _is_head(c) and not _is_gate(c)]
    lacking = [call for call in hidden if not _meets_batch_normalization(call)]
    if hidden and len(hidden) - len(lacking) > MOST * len(hidden):
        for call in lacking:
            evidence = {"with_it": len(hidden) - len(lacking), "hidden_layers": len(hidden)}
            yield Fault(call.path, evidence, "tn.BatchNormalization()(x) after it")


def after_dropout(facts: Facts) -> Iterator[Fault]:
    """TN302. Statistics taken without dropout are right: only enough data shows which these are."""
    dropouts = {site: call for site in facts.sites if (call := _dropout_before(site)) is not None}
    known = dropouts != {} and facts.lacks("data") is None
    if known and recalibration_harms(facts):
        return
    for site, call in dropouts.items():
        layer, rate = site.operation, _rate(call.operation)
        evidence = {"dropout": call.path, "rate": rate, "variance_kept": 1 - rate}
        right = facts.seen.training.sites.get(facts.layers[layer]) if known else None
        if right is None or is_untouched(layer):
            yield Fault(site.path, evidence, remedies.ASK)
            continue
        error = output_error(layer, *stored(layer), right)
        if error > noticeable(facts):
            evidence["output_error"] = error
            yield Fault(site.path, evidence, remedies.recalibrate_after_dropout(facts, layer))
        elif error > FREE * (1 - math.sqrt(1 - rate)):
            yield Fault(site.path, evidence, remedies.ASK)


def _dropout_before(site: Call) -> Call | None:
    """The nearest dropout that changes the variance of a site's input."""
    before = nearby(site, stop=is_site)
    return next((c for c in before if _rate(c.operation) >= SMALLEST_RATE), None)


def twice(facts: Facts) -> Iterator[Fault]:
    """TN303."""
    for site in facts.sites:
        before = site.only_producer
        if before is not None and is_site(before):
            yield Fault(site.path, {"follows": before.path}, remedies.remove(facts, site.path))


def on_output(facts: Facts) -> Iterator[Fault]:
    """TN304."""
    for site in facts.sites:
        last = site.consumers[0] if len(site.consumers) == 1 else None
        squashed = last is not None and last.is_output and _activation(last) in _SQUASHING
        if site.is_output or squashed:
            evidence = {"output": "its own" if last is None else f"{_activation(last)} of it"}
            yield Fault(site.path, evidence, remedies.remove(facts, site.path))


_SQUASHING = ("softmax", "sigmoid")


def wrong_axis(facts: Facts) -> Iterator[Fault]:
    """TN305."""
    for site in facts.sites:
        axis = channel_axis(site.operation)
        neighbours = (
            _neighbour(site, lambda c: c.only_producer),
            _neighbour(site, lambda c: c.only_consumer),
        )
        rank = site.operation.input_spec.ndim
        expected = {channel_axis_of(n.operation, rank) for n in neighbours if n is not None}
        if expected and axis not in expected:
            right = sorted(expected)[0]
            evidence = {"axis": axis, "channel_axis": right}
            yield Fault(site.path, evidence, f"keras.layers.BatchNormalization(axis={right})")


def shared(facts: Facts) -> Iterator[Fault]:
    """TN306."""
    for calls in _shared(facts).values():
        evidence = {
            "calls": len(calls),
            "steps_of_the_moving_average_per_batch": len(calls),
        }
        yield Fault(calls[0].path, evidence, remedies.apart(facts, calls[0].operation, len(calls)))


def shared_by_unlike(facts: Facts) -> Iterator[Fault]:
    """TN307."""
    for layer, path in facts.layers.items():
        calls = facts.seen.calls.get(path, ())
        merged = facts.seen.training.sites.get(path, Moments.zero(1))
        errors = [output_error(layer, merged.mean, merged.variance, one) for one in calls]
        if len(calls) > 1 and max(errors) > SKEW:
            evidence = {"calls": len(calls), "output_error": max(errors)}
            yield Fault(path, evidence, remedies.apart(facts, layer, len(calls)))


def gradient_accumulation(facts: Facts) -> Iterator[Fault]:
    """TN308."""
    steps = getattr(facts.optimizer, "gradient_accumulation_steps", None) or 1
    gathered = {getattr(layer, "accumulation_steps", 1) for layer in facts.layers}
    if steps > 1 and gathered != {steps}:
        momentum = {layer.momentum for layer in facts.layers} - {None}
        evidence = {
            "batches_per_step": steps,
            "momentum_per_step": min((float(np.power(m, steps)) for m in momentum), default=0.0),
        }
        remedy = f'model = tn.replace(model, to="truenorm", accumulation_steps={steps}).model'
        yield Fault(facts.model.name, evidence, remedy)


def mixed_positions(facts: Facts) -> Iterator[Fault]:
    """TN309."""
    positions = [position(site) for site in facts.sites]
    counts = {p: positions.count(p) for p in ("before_activation", "after_activation")}
    if all(counts.values()):
        more = max(counts, key=lambda p: counts[p])
        yield Fault(facts.model.name, counts, f'model = tn.place(model, "{more}").model')


# --- walking -----------------------------------------------------------------------------------


def _meets_batch_normalization(call: Call) -> bool:
    """Whether its output comes to a BatchNormalization before the next such layer."""
    return any(map(is_site, nearby(call, back=False, stop=is_linear)))


def _is_head(call: Call) -> bool:
    """Whether no convolution or dense layer and no BatchNormalization comes after it."""
    return not any(is_linear(one) or is_site(one) for one in nearby(call, back=False))


def _is_gate(call: Call) -> bool:
    """Whether it makes a factor for something else, as in squeeze-and-excitation: left without."""
    onward = nearby(call, back=False, stop=is_site)
    return any(type(one.operation).__name__ == "Multiply" for one in onward)


def _rate(layer: Any) -> float:
    """Of a dropout that changes variances; 0 for any other layer, and for stochastic depth."""
    if not isinstance(layer, _DROPOUT) or getattr(layer, "noise_shape", None) is not None:
        return 0.0
    return float(layer.rate)


def _activation(call: Call) -> str | None:
    function = getattr(call.operation, "activation", None)
    if isinstance(call.operation, keras.layers.Softmax):
        return "softmax"
    return getattr(function, "__name__", None) if is_activation(call) else None


def _neighbour(site: Call, step: Callable[[Call], Call | None]) -> Call | None:
    """The nearest convolution or dense layer on one side, past activations and dropout."""
    call = step(site)
    while call is not None and (is_activation(call) or isinstance(call.operation, _DROPOUT)):
        call = step(call)
    return call if is_linear(call) else None


def _shared(facts: Facts) -> dict[Any, list[Call]]:
    found: dict[Any, list[Call]] = {}
    for site in facts.sites:
        if site.shared:
            found.setdefault(site.operation, []).append(site)
    return found
