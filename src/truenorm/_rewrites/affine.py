r"""One scale and one shift per channel, and the layers that take them in or let them pass.

In inference mode a BatchNormalization is an *affine map*,

.. math:: y = s \odot x + t, \qquad s = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad
          t = \beta - s \odot \mu ,

and a linear layer :math:`W x + b` takes it in, whether it comes behind or before the map:

.. math:: s \odot (W x + b) + t &= (s \odot_{out} W)\, x + (s \odot b + t) , \\
          W (s \odot x + t) + b &= (W \odot_{in} s)\, x + (b + W t) ,

the latter only if no zero padding comes between, which would skip the shift at the borders. Another
BatchNormalization takes it in on both sides. On its way there a map passes what commutes with it:
dropout in inference mode, averages, maxima if no scale is negative, concatenations.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from truenorm._model.graph import Call, is_batch_normalization
from truenorm._model.sites import (
    LINEAR,
    channel_axis,
    channel_axis_of,
    fused_activation,
    is_linear,
    is_own_class,
)
from truenorm._model.values import as_float64
from truenorm._records.moments import Array

L = keras.layers
_CONVOLUTIONS = (L.Conv1D, L.Conv2D, L.Conv3D)
_DEPTHWISE = (L.DepthwiseConv1D, L.DepthwiseConv2D)
_SEPARABLE = (L.SeparableConv1D, L.SeparableConv2D)
_TRANSPOSED = (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)

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


@dataclass(frozen=True, eq=False)
class Affine:
    """``scale * x + shift`` along one axis.

    Args:
        scale: One number per channel, float64.
        shift: The same.
        axis: The axis of the channels, counted from the left.
    """

    scale: Array
    shift: Array
    axis: int

    def after(self, first: Affine) -> Affine:
        """The one map that does both, ``first`` first."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift, self.axis)


Taking = tuple[Call, Affine]
"""A call whose layer takes the map in."""


class CannotBeAbsorbed(Exception):  # noqa: N818 - no fault: it carries the reason for a receipt
    """Why an affine map can go no further."""


def affine_of(layer: Any) -> Affine:
    """What a BatchNormalization does in inference mode, its own activation aside."""
    variance = as_float64(layer.moving_variance) + layer.epsilon
    with np.errstate(invalid="ignore"):  # a negative stored variance: reported by the caller
        scale = 1.0 / np.sqrt(variance)
    if layer.scale:
        scale = scale * as_float64(layer.gamma)
    shift = -scale * as_float64(layer.moving_mean)
    if layer.center:
        shift = shift + as_float64(layer.beta)
    return Affine(scale, shift, channel_axis(layer))


def has_activation(layer: Any) -> bool:
    """Whether this BatchNormalization applies an activation of its own."""
    return getattr(layer, "activation", None) is not None


def in_training_mode(call: Call) -> bool:
    """Whether ``training=True`` is written into the graph for this call."""
    return call.written is not None and call.written[1]


def why_unfit(call: Call) -> str | None:
    """Why this BatchNormalization is no affine map that can be computed; None if it is one."""
    if is_own_class(call.operation):
        return f"its class {type(call.operation).__name__} is a custom subclass"
    if in_training_mode(call):
        return "it is called with training=True"
    if call.extras:
        return f"it is called with {', '.join(call.extras)}"
    if channel_axis(call.operation) == 0:
        return "its axis is that of the batch"
    affine = affine_of(call.operation)
    if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
        return "its moving statistics, gamma or beta are not finite numbers"
    return None


# --- on the way --------------------------------------------------------------------------------


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
            if fused_activation(producer):
                raise CannotBeAbsorbed(f"{producer.label()} has an activation")
            _require_neighbour(producer, part)
            takings.append((producer, part))
        else:
            takings += absorbed_before(producer, _input_of(producer, part), gone)
    return takings


def _parts(call: Call, affine: Affine) -> list[Affine]:
    """What a map of all of a call's input means for each of its inputs, where it has several."""
    if type(call.operation) is L.Add:
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
    layer, shapes = call.operation, call.input_shapes
    added = type(layer) is L.Add and len(set(shapes)) == 1
    along = _concatenates(call)
    if added or _joined(call, affine.axis) or along not in (None, affine.axis):
        return affine
    if isinstance(layer, _GLOBAL) and not layer.keepdims:
        affine = Affine(affine.scale, affine.shift, channel_axis_of(layer, len(shapes[0])))
    _require_passing(call, affine, "its input comes from")
    return affine


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
    if is_batch_normalization(call.operation) and has_activation(call.operation):
        raise CannotBeAbsorbed("its own activation is behind it")
    if not keras.backend.is_float_dtype(call.input_dtypes[0]):
        raise CannotBeAbsorbed(f"its input is {call.input_dtypes[0]}, which it makes floating")
    takings: list[Taking] = []
    for consumer in call.consumers:
        if is_linear(consumer) or is_batch_normalization(consumer.operation):
            if consumer.operation in fixed:
                raise CannotBeAbsorbed(f"its output goes to {consumer.label()}, which stays")
            _require_taking_before(consumer, affine)
            takings.append((consumer, affine))
        else:
            takings += absorbed_behind(consumer, _output_of(consumer, call, affine), fixed)
    return takings


def _require_taking_before(consumer: Call, affine: Affine) -> None:
    layer = consumer.operation
    if is_batch_normalization(layer):
        if consumer.shared or channel_axis(layer) != affine.axis:
            raise CannotBeAbsorbed(f"its output goes to {consumer.label()}, which cannot take it")
        return
    if isinstance(layer, _TRANSPOSED):
        raise CannotBeAbsorbed(f"{consumer.label()} spreads its input unevenly")
    padded = getattr(layer, "padding", "valid") != "valid" and any(k > 1 for k in layer.kernel_size)
    if padded:
        raise CannotBeAbsorbed(
            f"{consumer.label()} pads with zeros, so that its borders would change"
        )
    _require_neighbour(consumer, affine)


def _output_of(call: Call, source: Call, affine: Affine) -> Affine:
    """The map of a call's output that does what ``affine`` does to the input from ``source``."""
    layer, shape = call.operation, call.input_shapes[0]
    lengths = _joined(call, affine.axis)
    if lengths:
        parts = [
            (affine.scale, affine.shift) if producer is source else (np.ones(n), np.zeros(n))
            for producer, n in zip(call.producers, lengths, strict=True)
        ]
        scale, shift = (np.concatenate(vectors) for vectors in zip(*parts, strict=True))
        return Affine(scale, shift, affine.axis)
    if type(layer) is L.Flatten and None not in shape[1:]:
        return _flattened(affine, shape, first=layer.data_format == "channels_first")
    _require_passing(call, affine, "its output goes to")
    if isinstance(layer, _GLOBAL) and not layer.keepdims:
        return Affine(affine.scale, affine.shift, 1)
    return affine


def _flattened(affine: Affine, shape: tuple[int | None, ...], *, first: bool) -> Affine:
    """One number per flattened feature; Keras flattens channels first as if they were last."""

    def flat(vector: Array) -> Array:
        column = vector.reshape([-1 if a == affine.axis else 1 for a in range(1, len(shape))])
        full = np.broadcast_to(column, [d or 1 for d in shape[1:]])
        return (np.moveaxis(full, 0, -1) if first else full).reshape(-1)

    return Affine(flat(affine.scale), flat(affine.shift), 1)


def _joined(call: Call, axis: int) -> list[int]:
    """Lengths along the axis of what is concatenated along it; none if this does not do so."""
    lengths = [shape[axis] for shape in call.input_shapes if axis < len(shape)]
    known = [length for length in lengths if length is not None]
    return known if _concatenates(call) == axis and len(known) == len(lengths) else []


def _concatenates(call: Call) -> int | None:
    """Along which axis this concatenates; None if it does not."""
    if type(call.operation) is not L.Concatenate or call.extras:
        return None
    return call.operation.axis % len(call.input_shapes[0])


def _require_passing(call: Call, affine: Affine, link: str) -> None:
    """That a map before this call does the same as one behind it."""
    layer, kind = call.operation, type(call.operation)
    reason = f"{link} {call.label()}"
    if in_training_mode(call) or call.extras:
        raise CannotBeAbsorbed(reason)
    linear = kind is L.Activation and layer.activation is keras.activations.linear
    if kind in _NOTHING_IN_INFERENCE or linear:
        return
    if kind not in _BY_POSITION or affine.axis != channel_axis_of(layer, len(call.input_shapes[0])):
        raise CannotBeAbsorbed(reason)
    if kind in _MAXIMA and (affine.scale < 0).any():
        raise CannotBeAbsorbed(f"{reason}, which would pick others where its scale is negative")


def _require_neighbour(call: Call, affine: Affine) -> None:
    """That a convolution or dense layer can take in a map on either side."""
    layer = call.operation
    if type(layer) not in LINEAR:
        raise CannotBeAbsorbed(f"the class of {call.label()} is a custom subclass")
    if call.shared:
        raise CannotBeAbsorbed(f"{call.label()} is called more than once")
    if layer.quantization_mode is not None or getattr(layer, "lora_enabled", False):
        raise CannotBeAbsorbed(f"{call.label()} is quantised or has LoRA enabled")
    if affine.axis != channel_axis_of(layer, len(call.input_shapes[0])):
        raise CannotBeAbsorbed(f"its axis is not the channel axis of {call.label()}")


# --- the arithmetic ----------------------------------------------------------------------------


def values_of(layer: Any) -> list[Array]:
    """A linear layer's kernels and its bias, zero where it has none."""
    values = [as_float64(v) for v in layer.weights]
    if layer.use_bias:
        return values
    if isinstance(layer, _TRANSPOSED):
        channels = values[0].shape[-2]
    elif isinstance(layer, _DEPTHWISE):
        channels = values[0].shape[-2] * values[0].shape[-1]
    else:
        channels = values[-1].shape[-1]
    return [*values, np.zeros(channels)]


def with_map_behind(layer: Any, values: list[Array], affine: Affine) -> list[Array]:
    """Kernels and bias of the layer that does what this one and then the map do."""
    *kernels, bias = values
    kernel, scale = kernels[-1], affine.scale  # of a separable convolution the pointwise one
    if isinstance(layer, _TRANSPOSED):  # (…, outputs, inputs)
        kernel = kernel * scale[:, None]
    elif isinstance(layer, _DEPTHWISE):  # (…, inputs, multiplier): output i * multiplier + m
        kernel = kernel * scale.reshape(kernel.shape[-2:])
    else:  # (…, inputs, outputs)
        kernel = kernel * scale
    return [*kernels[:-1], kernel, bias * scale + affine.shift]


def with_map_before(layer: Any, values: list[Array], affine: Affine) -> list[Array]:
    """Kernels and bias of the layer that does what the map and then this one do."""
    kernel, *others, bias = values
    scale, shift = affine.scale[:, None], affine.shift[:, None]
    if isinstance(layer, _CONVOLUTIONS):  # (…, inputs of a group, outputs): each its group's
        wide = kernel.shape[-1] // layer.groups
        scale, shift = (
            np.repeat(vector.reshape(layer.groups, -1).T, wide, axis=1) for vector in (scale, shift)
        )
    summed = kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0) * shift
    each = isinstance(layer, _DEPTHWISE + _SEPARABLE)  # output i * multiplier + m
    added = summed.reshape(-1) if each else summed.sum(axis=0)
    for pointwise in others:
        added = added @ pointwise.reshape(-1, pointwise.shape[-1])
    return [kernel * scale, *others, bias + added]
