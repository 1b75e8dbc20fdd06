"""Follow a scale and shift through a model, to the layers that can absorb it.

Convolutions, dense layers and other BatchNormalization absorb one before or behind them.
``passing`` says which operations may lie in between.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras
import numpy as np

from truenorm._model.graph import Call, is_batch_normalization
from truenorm._model.sites import (
    LINEAR,
    channel_axis,
    channel_axis_of,
    is_own_class,
    is_quantised,
)
from truenorm._rewrites import einsum
from truenorm._rewrites.affine import TRANSPOSED, Affine, affine_of
from truenorm._rewrites.passing import (
    among,
    has_activation,
    in_training_mode,
    joined_along,
    parts,
    passed,
    picks,
    why_not_behind,
)
from truenorm._rewrites.wrappers import Inside, inside, normalizes_its_kernel

L = keras.layers

Taking = tuple[Call, Affine]
"""A call, and the map that its layer takes in."""


class CannotBeAbsorbed(Exception):  # noqa: N818 - no fault: it carries the reason for a receipt
    """Why an affine map can go no further."""


def why_unfit(call: Call) -> str | None:
    """Why a BatchNormalization is no affine map that can be computed; None if it is one."""
    layer = inside(call).layer
    if is_own_class(layer):
        return f"its class {type(layer).__name__} is a custom subclass"
    if getattr(layer, "domains", None) is not None:
        return "it has several domains: fold with domain=0, or another of them"
    if in_training_mode(call):
        return "it is called with training=True"
    others = [name for name in call.extras if name not in ("mask", "add")]
    if others:  # in inference a mask changes nothing
        return f"it is called with {', '.join(others)}"
    if channel_axis(layer) == 0:
        return "its axis is that of the batch"
    if layer is not call.operation and isinstance(getattr(layer, "activation", None), keras.Layer):
        return "its activation is a layer, which its wrapper calls for each step"
    stuck = why_not_behind(layer)
    if stuck:
        return stuck
    affine = affine_of(layer)
    if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
        return "its moving statistics, gamma or beta are not finite numbers"
    return None


def is_linear(call: Call) -> bool:
    """Whether the arithmetic of this layer is known: a convolution or dense layer."""
    return isinstance(inside(call).layer, (*LINEAR, L.EinsumDense))


# --- to what comes before ----------------------------------------------------------------------


def absorbed_before(call: Call, affine: Affine, gone: Collection[Any] = ()) -> list[Taking]:
    """Which calls before this one take in the map behind their output; all that are needed.

    Args:
        call: The call whose input the map is applied to.
        affine: The map.
        gone: BatchNormalization layers that others have taken in already.

    Raises:
        CannotBeAbsorbed: One of them does not; then none may.
    """
    if len(set(call.producers)) < len(call.producers):
        raise CannotBeAbsorbed(f"{call.label()} gets the same input twice")
    takings: list[Taking] = []
    for producer, part in zip(call.producers, _parts(call, affine), strict=True):
        if producer is None:
            raise CannotBeAbsorbed("its input comes from no layer: it is an input of the model")
        if producer.only_consumer is not call:
            raise CannotBeAbsorbed(f"{producer.label()} has other consumers too")
        if is_linear(producer):
            if has_activation(inside(producer).layer):
                raise CannotBeAbsorbed(f"{producer.label()} has an activation")
            takings.append((producer, _taken(producer, part, behind=True)))
        elif producer.operation in gone or len(producer.data) > 1:
            takings += absorbed_before(producer, part, gone)
        else:
            there = _passed(producer, part, "its input comes from", back=True)
            takings += absorbed_before(producer, there, gone)
    return takings


def _parts(call: Call, affine: Affine) -> list[Affine]:
    """What a map of all of a call's input means for each of its inputs."""
    if len(call.data) < 2:
        return [affine] * len(call.data)
    found = parts(call, affine)
    if found is None:
        raise CannotBeAbsorbed(f"its input comes from {call.label()}")
    return found


# --- to what comes behind ------------------------------------------------------------------------


def absorbed_behind(call: Call, affine: Affine, fixed: Collection[Any] = ()) -> list[Taking]:
    """Which calls behind this one take in the map before their input; all that are needed.

    Args:
        call: The call whose output the map is applied to.
        affine: The map.
        fixed: BatchNormalization layers that take nothing in.

    Raises:
        CannotBeAbsorbed: One of them does not; then none may.
    """
    if call.is_output or not call.consumers:
        raise CannotBeAbsorbed("its output goes to nothing: it is an output")
    layer = inside(call).layer
    if is_batch_normalization(layer) and has_activation(layer):
        raise CannotBeAbsorbed("its own activation is behind it")
    if is_batch_normalization(layer) and "add" in call.extras:
        raise CannotBeAbsorbed("what it adds comes behind it")
    if not keras.backend.is_float_dtype(call.input_dtypes[0]):
        raise CannotBeAbsorbed(f"its input is {call.input_dtypes[0]}, which it makes floating")
    takings: list[Taking] = []
    for consumer in call.consumers:
        twice = "add" in consumer.extras and [*consumer.producers].count(call) > 1
        if twice or call in consumer.aside:
            raise CannotBeAbsorbed(f"{consumer.label()} takes its output besides another input")
        if is_batch_normalization(inside(consumer).layer):
            if consumer.operation in fixed:
                raise CannotBeAbsorbed(f"its output goes to {consumer.label()}, which stays")
            takings.append((consumer, _taken_by_its_like(consumer, affine)))
        elif is_linear(consumer):
            takings.append((consumer, _taken(consumer, affine, behind=False)))
        else:
            takings += absorbed_behind(consumer, _output_of(consumer, call, affine), fixed)
    return takings


def _taken_by_its_like(consumer: Call, affine: Affine) -> Affine:
    seen = inside(consumer)
    local = seen.inward(affine)
    if local is None or consumer.shared or channel_axis(seen.layer) != local.axis:
        raise CannotBeAbsorbed(f"its output goes to {consumer.label()}, which cannot take it")
    return local


def _output_of(call: Call, source: Call, affine: Affine) -> Affine:
    """The map of a call's output that does what ``affine`` does to the input from ``source``."""
    joined = joined_along(call)
    if joined is None:
        return _passed(call, affine, "its output goes to", back=False)
    there = among(call, source, affine)
    if there is None:
        raise CannotBeAbsorbed(f"its output goes to {call.label()}")
    return there


def _passed(call: Call, affine: Affine, link: str, *, back: bool) -> Affine:
    """The map on the other side of a call of one input, which commutes with it."""
    there = passed(call, affine, back=back)
    if there is None:
        raise CannotBeAbsorbed(f"{link} {call.label()}")
    if picks(call) and (affine.scale < 0).any():
        reason = "which would pick others where its scale is negative"
        raise CannotBeAbsorbed(f"{link} {call.label()}, {reason}")
    return there


# --- who takes it in -----------------------------------------------------------------------------


def _taken(call: Call, affine: Affine, *, behind: bool) -> Affine:
    """The map as a convolution or dense layer can take it in, which it can."""
    seen = inside(call)
    layer, local = seen.layer, seen.inward(affine)
    if not behind and isinstance(layer, TRANSPOSED):
        raise CannotBeAbsorbed(f"{call.label()} spreads its input unevenly")
    if not behind and _pads(layer):
        raise CannotBeAbsorbed(f"{call.label()} pads with zeros, so that its borders would change")
    if type(layer) not in (*LINEAR, L.EinsumDense):
        raise CannotBeAbsorbed(f"the class of {call.label()} is a custom subclass")
    if call.shared:
        raise CannotBeAbsorbed(f"{call.label()} is called more than once")
    if in_training_mode(call) and normalizes_its_kernel(call.operation):
        raise CannotBeAbsorbed(f"{call.label()} is called with training=True")
    if is_quantised(layer):
        raise CannotBeAbsorbed(f"{call.label()} is quantised or has LoRA enabled")
    if local is None or not _has_axis(seen, local.axis, behind=behind):
        raise CannotBeAbsorbed(f"its axis is not the channel axis of {call.label()}")
    return local


def _pads(layer: Any) -> bool:
    return getattr(layer, "padding", "valid") != "valid" and any(k > 1 for k in layer.kernel_size)


def _has_axis(seen: Inside, axis: int, *, behind: bool) -> bool:
    if isinstance(seen.layer, L.EinsumDense):
        letters = einsum.letters_of(seen.layer)
        return (letters.of_output(axis) if behind else letters.of_input(axis)) is not None
    return axis == channel_axis_of(seen.layer, len(seen.shapes[0]))
