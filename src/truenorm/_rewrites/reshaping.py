"""A scale and shift where the same numbers, in the same order, have another shape."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from truenorm._records.moments import Array
from truenorm._rewrites.affine import Affine

Shape = tuple[int | None, ...]


def reshaped(affine: Affine, shape: Shape, other: Shape) -> Affine | None:
    """The map along an axis of the other shape; None if no axis has it.

    An axis is still there if it is as long and as many numbers are behind it, whatever became of
    those before it (lengths that are not known, and the batch, may be among these). If axes become
    one, each of its numbers has a scale of its own.
    """
    there = len(affine.scale), _behind(shape, affine.axis)
    for axis in range(1, len(other)):
        if None not in there and (other[axis], _behind(other, axis)) == there:
            return affine.along(axis)
    known, wanted = [n or 0 for n in shape[1:]], [n or 0 for n in other[1:]]
    if not math.prod(known) or math.prod(known) != math.prod(wanted):
        return None
    column = [-1 if axis == affine.axis else 1 for axis in range(1, len(shape))]
    scale, shift = (
        np.broadcast_to(vector.reshape(column), known).reshape(wanted)
        for vector in (affine.scale, affine.shift)
    )
    for axis in range(len(wanted)):
        vectors = [vector for full in (scale, shift) for vector in _constant_but_along(axis, full)]
        if len(vectors) == 2:
            return Affine(*vectors, axis + 1)
    return None


def _behind(shape: Shape, axis: int) -> int | None:
    """How many numbers are behind an axis; None if that is not known."""
    rest = [n for n in shape[axis + 1 :] if n is not None]
    return math.prod(rest) if len(rest) == len(shape) - axis - 1 else None


def _constant_but_along(axis: int, full: Array) -> Iterator[Array]:
    """The one vector along the axis that makes the whole, if there is one."""
    rows = np.moveaxis(full, axis, 0).reshape(full.shape[axis], -1)
    if (rows == rows[:, :1]).all():
        yield rows[:, 0]
