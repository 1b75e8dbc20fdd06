r"""Which operations a scale and shift can be moved across, and what they are on the other side.

Across :math:`a x + b`, with constants :math:`a \neq 0` and :math:`b`, the scale stays the same:

.. math:: s (a x + b) + t &= a (s x + t') + b, & t' &= (s b + t - b) / a , \\
          a (s x + t) + b &= s (a x + b) + t', & t' &= a t + b - s b .
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from truenorm._keras_internals import operation_classes
from truenorm._model.graph import Call
from truenorm._model.sites import channel_axis_of
from truenorm._model.values import as_float64
from truenorm._records.moments import Array
from truenorm._rewrites.affine import Affine
from truenorm._rewrites.rearranging import moved
from truenorm._rewrites.wrappers import Inside, Shape, inside

L = keras.layers
_NOTHING_IN_INFERENCE = (
    L.Dropout, L.SpatialDropout1D, L.SpatialDropout2D, L.SpatialDropout3D, L.AlphaDropout,
    L.GaussianDropout, L.GaussianNoise, L.ActivityRegularization, L.Identity,
)  # fmt: skip
_MOVES = (L.Flatten, L.Permute, L.RepeatVector, L.Reshape)
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


def _operations(*functions: str) -> tuple[type, ...]:
    made = operation_classes()
    return tuple(made[name] for name in functions)


# --- one input -----------------------------------------------------------------------------------


def passed(call: Call, affine: Affine, *, back: bool) -> Affine | None:
    """The map on the other side of a call of one input; None if it does not commute with it.

    Args:
        call: The call.
        affine: The map of its output, or of its input.
        back: Whether it is that of the output.
    """
    seen = inside(call)
    local = seen.inward(affine)
    given = set(call.extras) - {"mask"} if isinstance(call.operation, keras.Layer) else set[str]()
    if local is None or in_training_mode(call) or given or len(seen.shapes) != 1:
        return None
    there = _passed(call, seen, local, back=back)
    return there and seen.outward(there)


def picks(call: Call) -> bool:
    """Whether it takes a maximum or minimum, which a negative scale would exchange."""
    kinds = (*_MAXIMA, *_operations("max", "max_pool", "min"))
    return type(inside(call).layer) in kinds


def in_training_mode(call: Call) -> bool:
    """Whether ``training=True`` is written into the graph for this call."""
    return call.written is not None and call.written[1]


def has_activation(layer: Any) -> bool:
    """Whether this layer applies an activation of its own."""
    return getattr(layer, "activation", None) not in (None, keras.activations.linear)


def why_not_behind(layer: Any) -> str | None:
    """Why the activation of a layer cannot stand behind it; None if it can."""
    inside = getattr(layer, "activation", None)
    if isinstance(inside, keras.Layer) and not inside.built:
        return "its activation is a layer without weights as yet: call the model once"
    return None


def _passed(call: Call, seen: Inside, affine: Affine, *, back: bool) -> Affine | None:
    layer, kind, rank = seen.layer, type(seen.layer), len(seen.shapes[0])
    if kind in _NOTHING_IN_INFERENCE or (kind is L.Activation and not has_activation(layer)):
        return affine
    if kind in _MOVES or kind in _operations(
        "expand_dims", "flip", "get_item", "moveaxis", "repeat", "reshape", "squeeze", "swapaxes",
        "tile", "transpose",
    ):  # fmt: skip
        return moved(call, affine, back=back)
    if kind in _operations("max", "mean", "min", "sum"):
        return _reduced(layer, affine, seen.shapes[0], back=back)
    if kind in _BY_POSITION or kind in _operations("average_pool", "max_pool"):
        channels = channel_axis_of(layer, rank)
        short = isinstance(layer, _GLOBAL) and not layer.keepdims
        here, there = channels, 1 if short else channels
        here, there = (there, here) if back else (here, there)
        return affine.along(there) if affine.axis == here else None
    if seen.output != seen.shapes[0]:  # stretched to the shape of a constant
        return None
    return _scaled(call, affine, rank, back=back)


def _reduced(layer: Any, affine: Affine, shape: Shape, *, back: bool) -> Affine | None:
    """Through a mean, a maximum, a minimum, or a sum, whose shift is that of all its terms."""
    if getattr(layer, "initial", None) is not None:  # one more value, which is not mapped
        return None
    rank = len(shape)
    given = range(rank) if layer.axis is None else np.atleast_1d(layer.axis)
    away = {int(axis) % rank for axis in given}
    left = [axis for axis in range(rank) if axis not in away or layer.keepdims]
    inner = left[affine.axis] if back else affine.axis
    if inner in away or 0 in away:
        return None
    terms = 1
    if type(layer) in _operations("sum"):
        lengths = [shape[axis] for axis in away]
        terms = math.prod(length or 0 for length in lengths)
    if terms == 0:
        return None
    shift = affine.shift / terms if back else affine.shift * terms
    return Affine(affine.scale, shift, inner if back else left.index(inner))


def _scaled(call: Call, affine: Affine, rank: int, *, back: bool) -> Affine | None:
    """Through ``a x + b``."""
    found = _constants(call)
    a, b = (_along(constant, affine, rank) for constant in found or (0.0, 0.0))
    if a is None or b is None or not a.all():
        return None
    s, t = affine.scale, affine.shift
    return Affine(s, (s * b + t - b) / a if back else a * t + b - s * b, affine.axis)


def _constants(call: Call) -> tuple[Any, Any] | None:
    """``a`` and ``b`` of a call that computes ``a x + b``; None for others."""
    kind, layer = type(call.operation), call.operation
    if kind is L.Rescaling and np.ndim(layer.scale) == np.ndim(layer.offset) == 0:
        return layer.scale, layer.offset
    if kind in _operations("negative"):
        return -1.0, 0.0
    if kind not in _operations("add", "subtract", "multiply", "divide", "true_divide"):
        return None
    given = dict(zip(("x1", "x2"), call.node.arguments.args, strict=False))
    given |= call.node.arguments.kwargs
    behind = isinstance(given["x1"], keras.KerasTensor)
    constant = given["x2"] if behind else given["x1"]
    if isinstance(constant, keras.Variable):  # no constant
        return None
    constant = _numbers(constant)
    if kind in _operations("add"):
        return 1.0, constant
    if kind in _operations("multiply"):
        return constant, 0.0
    if kind in _operations("subtract"):
        return (1.0, -constant) if behind else (-1.0, constant)
    return (1.0 / constant, 0.0) if behind and constant.all() else None


def _numbers(constant: Any) -> Array:
    return np.asarray(constant, np.float64) if np.isscalar(constant) else as_float64(constant)


def _along(constant: Any, affine: Affine, rank: int) -> Array | None:
    """A constant as a vector along the axis of a map; None if it is another along other axes."""
    constant = _numbers(constant)
    shape = [1] * (rank - constant.ndim) + [*constant.shape]
    channels = len(affine.scale)
    if constant.size == 1 and len(shape) == rank:
        return np.full(channels, constant.item())
    fits = len(shape) == rank and shape[affine.axis] == constant.size == channels
    return constant.reshape(-1) if fits else None


# --- several inputs ------------------------------------------------------------------------------


def parts(call: Call, affine: Affine) -> list[Affine] | None:
    """What a map of the output is for each of several inputs; None if it does not commute.

    Of a sum all inputs take the scale and the first one the shift, of an average all take both. If
    they are joined along the axis, each takes its own.
    """
    kind, shapes = type(call.operation), call.input_shapes
    lengths, joined = _lengths(call, affine.axis), joined_along(call)
    if not lengths:
        return None
    if joined is not None and joined != affine.axis:
        return [affine] * len(shapes)
    if joined is not None:
        ends = np.cumsum(lengths)[:-1]
        pieces = zip(np.split(affine.scale, ends), np.split(affine.shift, ends), strict=True)
        return [Affine(scale, shift, affine.axis) for scale, shift in pieces]
    if {*lengths} != {len(affine.scale)} or len({*map(len, shapes)}) > 1:  # else: broadcast
        return None
    if kind is L.Average:
        return [affine] * len(shapes)
    if kind in (L.Add, L.Subtract, *_operations("add", "subtract")):
        bare = Affine(affine.scale, 0 * affine.shift, affine.axis)
        return [affine, *[bare] * (len(shapes) - 1)]
    return None


def among(call: Call, source: Call, affine: Affine) -> Affine | None:
    """The map of what is joined that does what ``affine`` does to the inputs from ``source``."""
    lengths = _lengths(call, affine.axis)
    if joined_along(call) != affine.axis or not lengths:
        return None
    parts = [
        (affine.scale, affine.shift) if producer is source else (np.ones(n), np.zeros(n))
        for producer, n in zip(call.producers, lengths, strict=True)
    ]
    scale, shift = (np.concatenate(vectors) for vectors in zip(*parts, strict=True))
    return Affine(scale, shift, affine.axis)


def _lengths(call: Call, axis: int) -> list[int]:
    """Of all inputs along the axis; nothing if one is not known, or has no such axis."""
    lengths = [shape[axis] for shape in call.input_shapes if axis < len(shape)]
    known = [length for length in lengths if length is not None]
    return known if len(known) == len(call.input_shapes) else []


def joined_along(call: Call) -> int | None:
    """Along which axis this joins several tensors; None if it does not."""
    if type(call.operation) not in (L.Concatenate, *_operations("concatenate")):
        return None
    return call.operation.axis % len(call.input_shapes[0])
