"""Sums of any number of values without loss of digits.

Added one after the other in float32, 10⁷ values are off by percents. So they are added in blocks,
the sums of these in blocks, and so on: each number goes through few additions, as in a pairwise sum
(Higham, 1993, "The accuracy of floating point summation"), and almost all of the time goes into the
first of these steps.

The last block is a rest that is never empty: where all blocks were alike, XLA would find that a sum
of sums is one sum, and add in sequence.
"""

from __future__ import annotations

from typing import Any

import keras

from truenorm._kernels.contract import Tensor

ops: Any = keras.ops

BLOCK = 64
LEVELS = 4
"""Where the size is not known before run time; enough for 64⁵ = 10⁹ values."""


def total(terms: Tensor, axis: int) -> Tensor:
    """The sum over one axis, which stays with size 1."""
    size = terms.shape[axis]
    if size is None:
        for _ in range(LEVELS):
            terms = _sums_of_blocks(terms, axis)
    elif isinstance(size, int):  # not the symbol of a program that is exported
        while terms.shape[axis] > BLOCK:
            terms = _sums_of_blocks(terms, axis)
    return ops.sum(terms, axis=axis, keepdims=True)


def _sums_of_blocks(terms: Tensor, axis: int) -> Tensor:
    shape = ops.shape(terms)
    blocks = (shape[axis] - 1) // BLOCK
    before = (slice(None),) * axis
    cut = blocks * BLOCK
    whole = ops.reshape(terms[*before, :cut], [*shape[:axis], blocks, BLOCK, *shape[axis + 1 :]])
    rest = ops.sum(terms[*before, cut:], axis=axis, keepdims=True)
    return ops.concatenate([ops.sum(whole, axis=axis + 1), rest], axis=axis)
