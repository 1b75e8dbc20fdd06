"""A scale and shift behind or before what only rearranges values: transpose, reshape, select.

Where each channel goes is found by running the operation on an array that holds the number of its
channel in each place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from truenorm._keras_internals import filled_in
from truenorm._model.graph import Call
from truenorm._model.values import numbers
from truenorm._rewrites.affine import Affine
from truenorm._rewrites.wrappers import Shape, inside

_OPEN = 61
"""The length that an axis of unknown length gets here: a prime, unlikely to be that of another."""


def moved(call: Call, affine: Affine, *, back: bool) -> Affine | None:
    """The map on the other side of a call; None if it is along no axis there.

    Args:
        call: Of a layer or operation that does nothing but move numbers.
        affine: The map of the output, or of the input of the layer inside.
        back: Whether it is that of the output.
    """
    seen = inside(call)
    for axis, length in _known(seen.shapes[0] if back else seen.output):
        channels = _where_to(call, *((axis, affine.axis) if back else (affine.axis, axis)))
        if channels is None:
            continue
        if not back:
            return Affine(affine.scale[channels], affine.shift[channels], axis)
        scale, shift = np.ones(length), np.zeros(length)
        scale[channels], shift[channels] = affine.scale, affine.shift
        if (scale[channels] == affine.scale).all() and (shift[channels] == affine.shift).all():
            return Affine(scale, shift, axis)
    return None


def _known(shape: Shape) -> Iterator[tuple[int, int]]:
    """The axes of known length but that of the batch, the last one first, with their lengths."""
    for axis in range(len(shape) - 1, 0, -1):
        length = shape[axis]
        if length is not None:
            yield axis, length


def _where_to(call: Call, axis: int, there: int) -> np.ndarray[Any, Any] | None:
    """Which channel along an axis of the input each one along an axis of the output is.

    None if that depends on the place along other axes too.
    """
    seen = inside(call)
    sizes = [seen.shapes[0][0] or 2, *(length or _OPEN for length in seen.shapes[0][1:])]
    column = [-1 if one == axis else 1 for one in range(len(sizes))]
    sent = np.broadcast_to(np.arange(sizes[axis], dtype="int32").reshape(column), sizes)
    try:
        arrived = _called(call, seen.layer, sent)
    except Exception:  # what an operation raises that does not take open axes of this length
        return None
    rows = np.moveaxis(arrived, there, 0).reshape(arrived.shape[there], -1)
    return rows[:, 0] if rows.size and (rows == rows[:, :1]).all() else None


def _called(call: Call, layer: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if isinstance(layer, keras.Layer):
        return numbers(layer(array))
    args, kwargs = filled_in(call.node, [keras.ops.convert_to_tensor(array)])
    return numbers(layer(*args, **kwargs))
