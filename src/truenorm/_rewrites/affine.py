r"""One scale and one shift per channel, and the arithmetic of the layers that take them in.

In inference mode a BatchNormalization is an *affine map*,

.. math:: y = s \odot x + t, \qquad s = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad
          t = \beta - s \odot \mu ,

and a linear layer :math:`W x + b` takes it in, whether it comes behind or before the map:

.. math:: s \odot (W x + b) + t &= (s \odot_{out} W)\, x + (s \odot b + t) , \\
          W (s \odot x + t) + b &= (W \odot_{in} s)\, x + (b + W t) ,

the latter only if no zero padding comes between, which would skip the shift at the borders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.sites import channel_axis
from truenorm._model.values import as_float64
from truenorm._records.moments import Array
from truenorm._rewrites import einsum

L = keras.layers
CONVOLUTIONS = (L.Conv1D, L.Conv2D, L.Conv3D)
DEPTHWISE = (L.DepthwiseConv1D, L.DepthwiseConv2D)
SEPARABLE = (L.SeparableConv1D, L.SeparableConv2D)
TRANSPOSED = (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)


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

    def along(self, axis: int) -> Affine:
        """The same along another axis."""
        return Affine(self.scale, self.shift, axis)


def affine_of(layer: BatchNormalizationLike) -> Affine:
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


def values_of(layer: Any) -> list[Array]:
    """A linear layer's kernels and its bias, zero where it has none."""
    if isinstance(layer, L.EinsumDense):
        return einsum.values_of(layer)
    values = [as_float64(v) for v in layer.weights]
    if layer.use_bias:
        return values
    if isinstance(layer, TRANSPOSED):
        channels = values[0].shape[-2]
    elif isinstance(layer, DEPTHWISE):
        channels = values[0].shape[-2] * values[0].shape[-1]
    else:
        channels = values[-1].shape[-1]
    return [*values, np.zeros(channels)]


def variables_of(layer: Any, values: list[Array]) -> tuple[list[Array], dict[str, Any]]:
    """The variables of a linear layer that has these values, and the change of its config."""
    if isinstance(layer, L.EinsumDense):
        return einsum.variables_of(layer, values)
    return values, {"use_bias": True}


def with_map_behind(layer: Any, values: list[Array], affine: Affine) -> list[Array]:
    """Kernels and bias of the layer that does what this one and then the map do."""
    if isinstance(layer, L.EinsumDense):
        return einsum.with_map_behind(layer, values, affine.scale, affine.shift, affine.axis)
    *kernels, bias = values
    kernel, scale = kernels[-1], affine.scale  # of a separable convolution the pointwise one
    if isinstance(layer, TRANSPOSED):  # (…, outputs, inputs)
        kernel = kernel * scale[:, None]
    elif isinstance(layer, DEPTHWISE):  # (…, inputs, multiplier): output i * multiplier + m
        kernel = kernel * scale.reshape(kernel.shape[-2:])
    else:  # (…, inputs, outputs)
        kernel = kernel * scale
    return [*kernels[:-1], kernel, bias * scale + affine.shift]


def with_map_before(layer: Any, values: list[Array], affine: Affine) -> list[Array]:
    """Kernels and bias of the layer that does what the map and then this one do."""
    if isinstance(layer, L.EinsumDense):
        return einsum.with_map_before(layer, values, affine.scale, affine.shift, affine.axis)
    kernel, *others, bias = values
    scale, shift = affine.scale[:, None], affine.shift[:, None]
    if isinstance(layer, CONVOLUTIONS):  # (…, inputs of a group, outputs): each its group's
        wide = kernel.shape[-1] // layer.groups
        scale, shift = (
            np.repeat(vector.reshape(layer.groups, -1).T, wide, axis=1) for vector in (scale, shift)
        )
    summed = kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0) * shift
    each = isinstance(layer, DEPTHWISE + SEPARABLE)  # output i * multiplier + m
    added = summed.reshape(-1) if each else summed.sum(axis=0)
    for pointwise in others:
        added = added @ pointwise.reshape(-1, pointwise.shape[-1])
    return [kernel * scale, *others, bias + added]
