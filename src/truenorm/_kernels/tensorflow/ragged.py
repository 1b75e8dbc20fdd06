"""TensorFlow's ragged tensors: rows of different lengths, of which only what is there counts."""

from __future__ import annotations

from typing import Any

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels.contract import Kernel, Normalized, Options, Tensor, Vector

tf: Any = tensorflow


def is_ragged(x: Tensor) -> bool:
    """Whether this is for the two functions below."""
    return isinstance(x, tf.RaggedTensor)


def of_values(
    kernel: Kernel, x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options
) -> Normalized:
    """Of all values together, where a kernel need not know which sample they are of."""
    axis, beside = options.axis % len(x.shape) - x.ragged_rank, (options.mask, options.add)
    if axis < 1 or not all(part is None or is_ragged(part) for part in beside):
        return padded(kernel, x, gamma, beta, options)
    mask, add = (None if part is None else _values_beside(x, part) for part in beside)
    found = kernel(x.flat_values, gamma, beta, options._replace(axis=axis, mask=mask, add=add))
    return found._replace(output=x.with_flat_values(found.output))


def _values_beside(x: Tensor, part: Tensor) -> Tensor:
    """The values of what goes with a ragged tensor, whose rows have to be as long as its own."""
    part = part.with_row_splits_dtype(x.row_splits.dtype)
    for own, its in zip(x.nested_row_splits, part.nested_row_splits, strict=True):
        tf.debugging.assert_equal(own, its, "Rows of a ragged tensor and of what goes with it")
    return part.flat_values


def padded(
    kernel: Kernel, x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options
) -> Normalized:
    """Filled up to a dense tensor, with a mask for what is there."""
    there = tf.ones(tf.shape(x.flat_values)[:1], tf.bool)
    there = x.with_flat_values(there).to_tensor(False)
    dense = x.to_tensor()
    mask = tf.reshape(
        there, tf.concat([tf.shape(there), [1] * (len(x.shape) - len(there.shape))], 0)
    )
    if options.mask is not None:
        given = options.mask.to_tensor(False) if is_ragged(options.mask) else options.mask
        mask = tf.logical_and(mask, given)
    add: Any = options.add
    if is_ragged(add):
        add = add.to_tensor()
    found = kernel(dense, gamma, beta, options._replace(mask=mask, add=add))
    return found._replace(output=x.with_flat_values(tf.boolean_mask(found.output, there)))
