"""Layers inside ``TimeDistributed`` and ``SpectralNormalization``, seen from a call in a graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import keras

from truenorm._model.edit import Piece
from truenorm._model.graph import Call, is_batch_normalization
from truenorm._rewrites.affine import Affine

L = keras.layers
Shape = tuple[int | None, ...]
_WRAPPERS = (L.TimeDistributed, L.SpectralNormalization)


@dataclass(frozen=True)
class Inside:
    """A call as the layer inside of its wrappers gets it.

    Args:
        layer: The innermost layer.
        steps: How many axes behind that of the batch the wrappers go along.
        shapes: Of its inputs.
        output: The shape of its output.
    """

    layer: Any
    steps: int
    shapes: tuple[Shape, ...]
    output: Shape

    def inward(self, affine: Affine) -> Affine | None:
        """A map of the call's tensors as one of the layer's; None if it is along the steps."""
        return affine.along(affine.axis - self.steps) if affine.axis > self.steps else None

    def outward(self, affine: Affine) -> Affine:
        """A map of the layer's tensors as one of the call's."""
        return affine.along(affine.axis + self.steps)


def inside(call: Call) -> Inside:
    """What is inside of the wrappers of a call; itself if there are none."""
    layer, steps = call.operation, 0
    while type(layer) in _WRAPPERS:
        steps += type(layer) is L.TimeDistributed
        layer = layer.layer

    def within(shape: Any) -> Shape:
        return (shape[0], *shape[1 + steps :])

    shapes = tuple(map(within, call.input_shapes))
    return Inside(layer, steps, shapes, within(call.node.outputs[0].shape))


def innermost(layer: Any) -> Any:
    """What is inside of the wrappers of a layer; itself if there are none."""
    return innermost(layer.layer) if type(layer) in _WRAPPERS else layer


def normalizes_its_kernel(layer: Any) -> bool:
    """Whether a ``SpectralNormalization`` among the wrappers changes the kernel in training."""
    if type(layer) not in _WRAPPERS:
        return False
    return type(layer) is L.SpectralNormalization or normalizes_its_kernel(layer.layer)


def site_of(call: Call) -> Call:
    """A call that normalises, as one of the BatchNormalization that is inside."""
    layer = innermost(call.operation)
    if layer is call.operation:
        return call
    return replace(call, path=f"{call.path}/{layer.name}", operation=layer)


def normalizes(call: Call) -> bool:
    """Whether this call is a BatchNormalization, or one for each step."""
    return is_batch_normalization(innermost(call.operation))


def wrapped_like(operation: Any, piece: Piece) -> Piece:
    """A piece for the innermost layer, in the wrappers that an operation has for each step.

    ``SpectralNormalization`` does nothing in inference, and what it would do in training would be
    wrong for a kernel that has taken something in: it is left out.
    """
    if type(operation) is L.TimeDistributed:
        inner = wrapped_like(operation.layer, piece)
        options = {"name": operation.name, "dtype": operation.dtype_policy}
        layer = L.TimeDistributed(inner.layer, **options)
        return Piece(layer, operation, piece.values, frozen=piece.frozen)
    if type(operation) is L.SpectralNormalization:
        piece.layer.name = operation.name
        return Piece(piece.layer, operation, piece.values, frozen=piece.frozen)
    return piece
