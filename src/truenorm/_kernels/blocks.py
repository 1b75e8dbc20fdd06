"""Sums of any number of values without loss of digits.

Added one after the other in float32, 10⁷ values are off by percents. So they are added in blocks,
the sums of these in blocks, and so on: each number goes through few additions, as in a pairwise sum
(Higham, 1993, "The accuracy of floating point summation"), and almost all of the time goes into the
first of these steps.

Between two steps stands a choice that chooses nothing: without it XLA would find that a sum of sums
is one sum, and add in sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras

from truenorm._kernels.contract import Tensor

ops: Any = keras.ops

ADDS_IN_SEQUENCE = keras.config.backend() == "tensorflow"
BLOCK = 64

LEVELS = 5
"""Where the size is not known before run time; of blocks of 32 enough for 32⁶ = 10⁹ values."""


def total(terms: Tensor, axis: int, block: int = BLOCK) -> Tensor:
    """The sum over one axis, which stays with size 1, in blocks of this many values."""
    size = terms.shape[axis]
    if size is None:
        for _ in range(LEVELS):
            terms = _sums_of_blocks(terms, axis, block)
    elif isinstance(size, int):  # not the symbol of a program that is exported
        while terms.shape[axis] > block:
            terms = _sums_of_blocks(terms, axis, block)
    return ops.sum(terms, axis=axis, keepdims=True)


def sums(terms: Tensor, axes: Sequence[int]) -> Tensor:
    """The sum over some axes, which stay with size 1; the other backends have good sums."""
    if not ADDS_IN_SEQUENCE:
        return ops.sum(terms, axis=axes, keepdims=True)
    for axis in reversed(axes):
        terms = total(terms, axis)
    return terms


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Values of size 1 along some axes, stretched to a shape; the derivative's sums are in blocks.

    Other backends stretch them by themselves, and add well in their derivatives.
    """
    if not ADDS_IN_SEQUENCE:
        return values
    axes = [axis for axis, size in enumerate(values.shape) if size == 1]
    shape = ops.shape(like)

    @ops.custom_gradient
    def stretched(values: Tensor) -> Any:
        def summed(upstream: Tensor) -> Tensor:
            for axis in reversed(axes):
                upstream = total(upstream, axis)
            return upstream

        return ops.broadcast_to(values, shape), summed

    return stretched(values)


def _sums_of_blocks(terms: Tensor, axis: int, block: int) -> Tensor:
    shape = ops.shape(terms)
    blocks = (shape[axis] - 1) // block
    before = (slice(None),) * axis
    cut = blocks * block
    whole = ops.reshape(terms[*before, :cut], [*shape[:axis], blocks, block, *shape[axis + 1 :]])
    rest = ops.sum(terms[*before, cut:], axis=axis, keepdims=True)
    sums = ops.concatenate([ops.sum(whole, axis=axis + 1), rest], axis=axis)
    return ops.where(ops.isnan(sums), math.nan, sums)
