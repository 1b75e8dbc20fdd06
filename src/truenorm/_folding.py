r"""Fold BatchNormalization into its convolution or dense layer, for inference.

In inference mode a BatchNormalization is one scale and one shift per channel,

.. math:: y = s \odot x + t, \qquad s = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad
          t = \beta - s \odot \mu ,

and a linear layer :math:`W x + b` takes both in.

- **Backward**, into the layer before: :math:`W' = s \odot_{out} W,\; b' = s \odot b + t`.
- **Forward**, into the layer after: :math:`W' = W \odot_{in} s,\; b' = b + W t`; exact only if no
  zero padding comes between, which would skip the shift at the borders.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from truenorm._graph import Call
from truenorm._moments import Array
from truenorm._probe import as_float64, make_inputs, verify
from truenorm._rebuilding import Piece, copy_of, rebuild
from truenorm._records.rewrites import Change, Rewrite
from truenorm._records.sites import Left
from truenorm._sites import LINEAR, apply, channel_axis, fused_activation, is_linear, is_own_class

_KERNEL_LAST = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def fold(model: Any, *, probe: Any = None) -> Rewrite:
    """Fold every BatchNormalization that can be folded into a neighbour, for inference.

    The new model computes what the old one computes with ``training=False``, with fewer layers;
    it is verified on a probe before it is returned. A BatchNormalization folds into the
    convolution or dense layer directly before it; one that comes after an activation folds into
    the dense or unpadded convolution layer directly after it. All others stay, with their reason
    in the receipt.

    Args:
        model: A functional or built Sequential ``keras.Model``, nested ones included. It is not
            changed.
        probe: Inputs to verify on, as the model takes them; made from the input specification
            (standard normal) where none are given.

    Returns:
        The folded model with its receipt and the largest differences of the outputs.

    Raises:
        ModelError: The model is subclassed, not built, or has no BatchNormalization.
        DataError: The model does not take ``probe``.
        VerificationError: The outputs would differ by more than rounding.

    Example:
        >>> import keras, truenorm as tn
        >>> model = keras.Sequential([
        ...     keras.Input((8,)), keras.layers.Dense(4), keras.layers.BatchNormalization()])
        >>> [type(layer).__name__ for layer in tn.fold(model).model.layers]
        ['Dense']

    Reference:
        Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", section 3.2, equation 14, arXiv:1712.05877.
    """
    weights: dict[Any, list[Array]] = {}
    edit: dict[Any, list[Piece]] = {}

    def rule(call: Call) -> Change | Left:
        result = _fold_one(call, weights)
        if isinstance(result, Change):
            edit[call.operation] = _what_stays(call.operation)
        return result

    changed, left = apply(rule, model)
    edit.update({k: [copy_of(k, values, use_bias=True)] for k, values in weights.items()})
    new = rebuild(model, edit)
    errors = verify(model, new, make_inputs(model) if probe is None else probe, "Folding")
    return Rewrite(new, "fold", changed, left, *errors)


def why_not_folded(call: Call) -> str | None:
    """Why this site can be folded into neither of its neighbours; None if it can."""
    if is_own_class(call.operation):
        return f"its class {type(call.operation).__name__} is somebody's own"
    if call.shared:
        return "it is called more than once"
    if call.training:
        return "it is called with training=True"
    if not all(np.isfinite(values).all() for values in _affine(call.operation)):
        return "its moving statistics, gamma or beta are not finite numbers"
    before, after = _why_not_backward(call), _why_not_forward(call)
    return f"{before}; {after}" if before and after else None


def _fold_one(call: Call, weights: dict[Any, list[Array]]) -> Change | Left:
    """Fold one site into ``weights`` (layer -> kernels and bias, float64), or say why not."""
    reason = why_not_folded(call)
    if reason is not None:
        return Left(call.path, reason)
    scale, shift = _affine(call.operation)
    if _why_not_backward(call) is None:
        producer: Any = call.only_producer
        layer = producer.operation
        weights[layer] = _scaled_outputs(layer, weights.get(layer) or _float64(layer), scale, shift)
        return Change(call.path, f"folded into {producer.label()} before it")
    consumer: Any = call.only_consumer
    layer = consumer.operation
    weights[layer] = _scaled_inputs(weights.get(layer) or _float64(layer), scale, shift)
    return Change(call.path, f"folded into {consumer.label()} after it")


def _what_stays(layer: Any) -> list[Piece]:
    """Of a layer that was folded away: its own activation, if it had one."""
    activation = getattr(layer, "activation", None)
    if activation is None:
        return []
    name, dtype = f"{layer.name}_activation", layer.dtype_policy
    return [Piece(keras.layers.Activation(activation, name=name, dtype=dtype))]


def _why_not_backward(call: Call) -> str | None:
    producer = call.only_producer
    if producer is None or not is_linear(producer):
        return "its input comes from " + (producer.label() if producer else "no single layer")
    if fused_activation(producer):
        return f"{producer.label()} has an activation"
    if producer.only_consumer is not call:
        return f"{producer.label()} has other consumers too"
    return _why_not(call, producer)


def _why_not_forward(call: Call) -> str | None:
    consumer = call.only_consumer
    if getattr(call.operation, "activation", None) is not None:
        return "its own activation is behind it"
    if consumer is None or type(consumer.operation) not in _KERNEL_LAST:
        takers = ", ".join(c.label() for c in call.consumers) or "nothing: it is an output"
        return f"its output goes to {takers}"
    layer = consumer.operation
    padded = getattr(layer, "padding", "valid") != "valid" and any(k > 1 for k in layer.kernel_size)
    if padded:
        return f"{consumer.label()} pads with zeros, so that its borders would change"
    if getattr(layer, "groups", 1) > 1:
        return f"{consumer.label()} has groups"
    return _why_not(call, consumer)


def _why_not(call: Call, neighbour: Call) -> str | None:
    """What forbids folding into a neighbour on either side."""
    layer = neighbour.operation
    if type(layer) not in LINEAR:
        return f"the class of {neighbour.label()} is somebody's own"
    if neighbour.shared:
        return f"{neighbour.label()} is called more than once"
    if layer.quantization_mode is not None or getattr(layer, "lora_enabled", False):
        return f"{neighbour.label()} is quantised or has LoRA enabled"
    first = getattr(layer, "data_format", None) == "channels_first"
    if channel_axis(call.operation) != (1 if first else call.operation.input_spec.ndim - 1):
        return f"its axis is not the channel axis of {neighbour.label()}"
    return None


def _affine(layer: Any) -> tuple[Array, Array]:
    variance = as_float64(layer.moving_variance) + layer.epsilon
    with np.errstate(invalid="ignore"):  # a negative stored variance: reported by the caller
        scale = 1.0 / np.sqrt(variance)
    if layer.scale:
        scale = scale * as_float64(layer.gamma)
    shift = -scale * as_float64(layer.moving_mean)
    return scale, shift + as_float64(layer.beta) if layer.center else shift


def _float64(layer: Any) -> list[Array]:
    """The layer's kernels and its bias, zero where it has none."""
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


def _scaled_outputs(layer: Any, values: list[Array], scale: Array, shift: Array) -> list[Array]:
    *kernels, bias = values
    kernel = kernels[-1]  # of a separable convolution the pointwise one: it makes the outputs
    if isinstance(layer, _TRANSPOSED):  # (…, outputs, inputs)
        kernel = kernel * scale[:, None]
    elif isinstance(layer, _DEPTHWISE):  # (…, inputs, multiplier): output i * multiplier + m
        kernel = kernel * scale.reshape(kernel.shape[-2:])
    else:  # (…, inputs, outputs)
        kernel = kernel * scale
    return [*kernels[:-1], kernel, bias * scale + shift]


def _scaled_inputs(values: list[Array], scale: Array, shift: Array) -> list[Array]:
    kernel, bias = values  # one kernel layout only: (…, inputs, outputs)
    summed = kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0)
    return [kernel * scale[:, None], bias + shift @ summed]
