"""New layers: a BatchNormalization where there is none, an activation split out of its layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras

from truenorm._model.edit import Piece, activation_of, copy_of, own_variables
from truenorm._model.graph import Call, is_batch_normalization, label_of, nearby
from truenorm._model.sites import fused_activation, is_activation, is_linear


def lacks_batch_normalization(call: Call) -> bool:
    """Whether no BatchNormalization follows this convolution or dense layer before the next one.

    One that only adds what comes from here, behind its normalisation, does not count.
    """
    if not is_linear(call):
        return False
    after = list(nearby(call, back=False, stop=is_linear))
    sources = {id(call), *(id(other) for other in after if not is_linear(other))}
    return not any(
        _is_site(other) and any(id(one) in sources for one in other.producers) for other in after
    )


def insertion(
    call: Call, *, behind_activation: bool, taken: Collection[str]
) -> str | tuple[str, dict[Any, list[Piece]]]:
    """Why a convolution or dense layer gets no BatchNormalization, or what is done and the edit.

    Args:
        call: A call that lacks one.
        behind_activation: Whether it stands behind the layer's activation instead of before it.
        taken: Names that the new layer cannot have.
    """
    layer, consumer = call.operation, call.only_consumer
    if not any(is_linear(other) or _is_site(other) for other in nearby(call, back=False)):
        return "it is an output layer: no convolution or dense layer comes after it"
    if call.shared or call.is_output:
        return "it is called more than once" if call.shared else "it is an output of the model"
    batch_norm = _new(layer, taken)
    inserted = f"{label_of(batch_norm.layer)} inserted"
    if fused_activation(call) and not behind_activation:
        bare, activation = split(layer)
        what = f"{inserted} before '{fused_activation(call)}', split out"
        return what, {layer: [bare, batch_norm, activation]}
    if fused_activation(call) or not behind_activation or not is_activation(consumer):
        return f"{inserted} behind it", {layer: [copy_of(layer), batch_norm]}
    if consumer is None or consumer.shared or consumer.is_output:
        return "its activation is called more than once, or is an output of the model"
    what = f"{inserted} behind {consumer.label()}"
    return what, {consumer.operation: [copy_of(consumer.operation), batch_norm]}


def split(layer: Any) -> tuple[Piece, Piece]:
    """A convolution or dense layer without its activation, and this as a layer of its own."""
    bare = copy_of(layer, own_variables(layer), activation="linear")
    return bare, activation_of(layer, split_name(layer))


def split_name(layer: Any) -> str:
    """How an activation is named that was split out of this layer."""
    return f"{layer.name}_activation"


def _new(layer: Any, taken: Collection[str]) -> Piece:
    """Keras's BatchNormalization for the channels of this layer, in its dtype."""
    (axis,) = layer.input_spec.axes
    name, number = f"{layer.name}_bn", 1
    while name in taken:
        name, number = f"{layer.name}_bn_{number}", number + 1
    return Piece(keras.layers.BatchNormalization(axis=axis, name=name, dtype=layer.dtype_policy))


def _is_site(call: Call) -> bool:
    return is_batch_normalization(call.operation)
