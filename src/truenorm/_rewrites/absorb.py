"""The way of a scale and shift through a model, to the layers that take it in.

Convolutions and dense layers take one in on either side, BatchNormalization as well. On its way
there it passes what commutes with it: dropout in inference mode, averages, maxima if no scale is
negative, sums, concatenations, and what only moves numbers to other places.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras
import numpy as np

from truenorm._keras_internals import operation_classes
from truenorm._model.graph import Call, is_batch_normalization
from truenorm._model.sites import LINEAR, channel_axis, channel_axis_of, is_own_class
from truenorm._rewrites import einsum
from truenorm._rewrites.affine import TRANSPOSED, Affine, affine_of
from truenorm._rewrites.reshaping import Shape, reshaped
from truenorm._rewrites.wrappers import Inside, inside

L = keras.layers
_NOTHING_IN_INFERENCE = (
    L.Dropout, L.SpatialDropout1D, L.SpatialDropout2D, L.SpatialDropout3D, L.AlphaDropout,
    L.GaussianDropout, L.GaussianNoise, L.ActivityRegularization, L.Identity,
)  # fmt: skip
_GLOBAL_MAXIMA = (L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D)
_GLOBAL = (
    *_GLOBAL_MAXIMA,
    L.GlobalAveragePooling1D, L.GlobalAveragePooling2D, L.GlobalAveragePooling3D,
)  # fmt: skip
_MAXIMA = (*_GLOBAL_MAXIMA, L.MaxPooling1D, L.MaxPooling2D, L.MaxPooling3D)
_BY_POSITION = (
    *_MAXIMA, *_GLOBAL, L.AveragePooling1D, L.AveragePooling2D, L.AveragePooling3D,
    L.Cropping1D, L.Cropping2D, L.Cropping3D, L.UpSampling1D, L.UpSampling2D, L.UpSampling3D,
)  # fmt: skip
"""Each output is a selection or a weighted mean of one channel; padding counts in neither, or as
the value at the edge, on every backend."""

Taking = tuple[Call, Affine]
"""A call whose layer takes the map in."""


class CannotBeAbsorbed(Exception):  # noqa: N818 - no fault: it carries the reason for a receipt
    """Why an affine map can go no further."""


def why_unfit(call: Call) -> str | None:
    """Why a BatchNormalization is no affine map that can be computed; None if it is one."""
    layer = inside(call).layer
    if is_own_class(layer):
        return f"its class {type(layer).__name__} is a custom subclass"
    if in_training_mode(call):
        return "it is called with training=True"
    if call.extras and call.extras != ("mask",):  # in inference a mask changes nothing
        return f"it is called with {', '.join(call.extras)}"
    if channel_axis(layer) == 0:
        return "its axis is that of the batch"
    affine = affine_of(layer)
    if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
        return "its moving statistics, gamma or beta are not finite numbers"
    return None


def in_training_mode(call: Call) -> bool:
    """Whether ``training=True`` is written into the graph for this call."""
    return call.written is not None and call.written[1]


def has_activation(layer: Any) -> bool:
    """Whether this layer applies an activation of its own."""
    return getattr(layer, "activation", None) not in (None, keras.activations.linear)


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
        if producer.operation in gone:
            takings += absorbed_before(producer, part, gone)
        elif is_linear(producer):
            if has_activation(inside(producer).layer):
                raise CannotBeAbsorbed(f"{producer.label()} has an activation")
            takings.append((producer, _taken(producer, part, behind=True)))
        else:
            takings += absorbed_before(producer, _input_of(producer, part), gone)
    return takings


def _parts(call: Call, affine: Affine) -> list[Affine]:
    """What a map of all of a call's input means for each of its inputs, where it has several."""
    if _is_sum(call):
        bare = Affine(affine.scale, 0 * affine.shift, affine.axis)
        return [affine, *[bare] * (len(call.producers) - 1)]
    lengths = _joined(call, affine.axis)
    if not lengths:
        return [affine] * len(call.producers)
    ends = np.cumsum(lengths)[:-1]
    pieces = zip(np.split(affine.scale, ends), np.split(affine.shift, ends), strict=True)
    return [Affine(scale, shift, affine.axis) for scale, shift in pieces]


def _input_of(call: Call, affine: Affine) -> Affine:
    """The map of the input that does to a call's output what ``affine`` does."""
    along = _concatenates(call)
    if _is_sum(call) or _joined(call, affine.axis) or along not in (None, affine.axis):
        return affine
    return _passed(call, affine, "its input comes from", back=True)


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
    if not keras.backend.is_float_dtype(call.input_dtypes[0]):
        raise CannotBeAbsorbed(f"its input is {call.input_dtypes[0]}, which it makes floating")
    takings: list[Taking] = []
    for consumer in call.consumers:
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
    lengths = _joined(call, affine.axis)
    if not lengths:
        return _passed(call, affine, "its output goes to", back=False)
    parts = [
        (affine.scale, affine.shift) if producer is source else (np.ones(n), np.zeros(n))
        for producer, n in zip(call.producers, lengths, strict=True)
    ]
    scale, shift = (np.concatenate(vectors) for vectors in zip(*parts, strict=True))
    return Affine(scale, shift, affine.axis)


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
    if layer.quantization_mode is not None or getattr(layer, "lora_enabled", False):
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


# --- what lets it pass ---------------------------------------------------------------------------


def _is_sum(call: Call) -> bool:
    """Whether this adds, or subtracts, tensors of one shape."""
    made = operation_classes()
    kinds = (L.Add, L.Subtract, made["add"], made["subtract"])
    alike = len(call.producers) > 1 and len({*call.input_shapes}) == 1
    return alike and type(call.operation) in kinds


def _joined(call: Call, axis: int) -> list[int]:
    """Lengths along the axis of what is concatenated along it; none if this does not do so."""
    lengths = [shape[axis] for shape in call.input_shapes if axis < len(shape)]
    known = [length for length in lengths if length is not None]
    return known if _concatenates(call) == axis and len(known) == len(lengths) else []


def _concatenates(call: Call) -> int | None:
    """Along which axis this concatenates; None if it does not."""
    kinds = (L.Concatenate, operation_classes()["concatenate"])
    if type(call.operation) not in kinds or call.extras:
        return None
    return call.operation.axis % len(call.input_shapes[0])


def _passed(call: Call, affine: Affine, link: str, *, back: bool) -> Affine:
    """The map on the other side of a call that commutes with it."""
    seen, reason = inside(call), f"{link} {call.label()}"
    local = seen.inward(affine)
    if local is None or in_training_mode(call) or call.extras or len(seen.shapes) > 1:
        raise CannotBeAbsorbed(reason)
    passed = _moved(seen, local, back=back)
    if passed is None:
        raise CannotBeAbsorbed(reason)
    maxima = (*_MAXIMA, operation_classes()["max"])
    if type(seen.layer) in maxima and (affine.scale < 0).any():
        raise CannotBeAbsorbed(f"{reason}, which would pick others where its scale is negative")
    return seen.outward(passed)


def _moved(seen: Inside, affine: Affine, *, back: bool) -> Affine | None:
    """The map on the other side of a layer; None if it does not commute with it."""
    layer, kind, shape = seen.layer, type(seen.layer), seen.shapes[0]
    made = operation_classes()
    if kind in _NOTHING_IN_INFERENCE or (kind is L.Activation and not has_activation(layer)):
        return affine
    if kind in (L.Permute, made["transpose"]):
        return _permuted(layer, affine, len(shape), back=back)
    if kind in (made["mean"], made["max"]):
        return _reduced(layer, affine, len(shape), back=back)
    if kind is L.Flatten and layer.data_format == "channels_first" and len(shape) > 2:
        return _flattened_first(affine, shape, seen.output, back=back)
    if kind in (L.Flatten, L.Reshape, *(made[k] for k in ("expand_dims", "reshape", "squeeze"))):
        return reshaped(affine, *((seen.output, shape) if back else (shape, seen.output)))
    if kind not in _BY_POSITION:
        return None
    channels = channel_axis_of(layer, len(shape))
    before, behind = channels, channels
    if isinstance(layer, _GLOBAL) and not layer.keepdims:
        behind = 1
    here, there = (behind, before) if back else (before, behind)
    return affine.along(there) if affine.axis == here else None


def _permuted(layer: Any, affine: Affine, rank: int, *, back: bool) -> Affine | None:
    axes = (0, *layer.dims) if isinstance(layer, L.Permute) else layer.axes
    axes = list(range(rank))[::-1] if axes is None else [axis % rank for axis in axes]
    if axes[0] != 0:  # other samples are in the batch than before
        return None
    return affine.along(axes[affine.axis] if back else axes.index(affine.axis))


def _reduced(layer: Any, affine: Affine, rank: int, *, back: bool) -> Affine | None:
    given = range(rank) if layer.axis is None else np.atleast_1d(layer.axis)
    away = {int(axis) % rank for axis in given}
    left = [axis for axis in range(rank) if axis not in away or layer.keepdims]
    inner = left[affine.axis] if back else affine.axis
    if inner in away or 0 in away:
        return None
    return affine.along(inner if back else left.index(inner))


def _flattened_first(affine: Affine, shape: Shape, output: Shape, *, back: bool) -> Affine | None:
    """Keras flattens channels first as if they were last."""
    last = len(shape) - 1
    moved = (shape[0], *shape[2:], shape[1])
    if not back:
        axis = last if affine.axis == 1 else affine.axis - 1
        return reshaped(affine.along(axis), moved, output)
    before = reshaped(affine, output, moved)
    if before is None:
        return None
    return before.along(1 if before.axis == last else before.axis + 1)
