"""Which values of a batch count: a mask as Keras means it, brought to the rank of the input.

Keras's masks (``Masking``, ``Embedding(mask_zero=True)``, a user's own) have the shape of the input
without its *last* axis, whichever axis holds the channels; any of their axes may be of size 1. So
with channels first, ``axis=1`` on (N, C, T), a mask (N, C) excludes values per sample and channel,
and each channel has a count of its own. A mask that does not fit so, but fits the input without its
channel axis, is that; where both fit, Keras's meaning wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from truenorm._errors import DataError
from truenorm._kernels.contract import Tensor

ops: Any = keras.ops

Shape = Sequence[int | None]
"""Sizes; None where a size is known at run time only."""


def aligned(mask: Tensor, x: Tensor, axis: int, where: str | None = None) -> Tensor:
    """The mask as booleans of the rank of ``x``, each axis of the size of that of ``x``, or 1.

    Args:
        mask: A mask as Keras means it, or in the shape of ``x`` without its channel axis.
        x: The input.
        axis: Which axis of the input holds the channels.
        where: The layer's path, for the message.

    Raises:
        DataError: The mask fits in neither way.
    """
    mask = ops.cast(ops.convert_to_tensor(mask), "bool")
    lacks = lacking(mask.shape, x.shape, axis)
    if not lacks:
        shape, rank = tuple(x.shape), len(x.shape)
        channel = axis % rank
        raise DataError(
            "The mask does not fit the input of BatchNormalization",
            where=where,
            expected=f"shape {shape[:-1]}, that of the input without its last axis, or "
            f"{shape[:channel] + shape[channel + 1 :]}, without its channel axis",
            received=f"shape {tuple(mask.shape)} for an input of shape {shape}",
        )
    if len(lacks) == 1:
        return ops.expand_dims(mask, lacks[0])
    # Sizes decide that are known at run time only.
    sizes = ops.stack([*ops.shape(mask)])
    fits = ops.logical_or(sizes == ops.stack([*ops.shape(x)[:-1]]), sizes == 1)
    as_keras, by_rows = ([*ops.shape(mask)[:at], 1, *ops.shape(mask)[at:]] for at in lacks)
    return ops.reshape(mask, ops.where(ops.all(fits), ops.stack(as_keras), ops.stack(by_rows)))


def lacking(mask: Shape, x: Shape, axis: int) -> tuple[int, ...]:
    """Which axis of the input a mask of this shape lacks; several if only run time can tell."""
    last, channel = len(x) - 1, axis % len(x)
    found: list[int] = []
    for at in (last, channel):
        wanted = (*x[:at], *x[at + 1 :])
        if at in found or len(mask) != len(wanted):
            continue
        pairs = list(zip(mask, wanted, strict=True))
        if all(have in (want, 1) for have, want in pairs):
            return (*found, at)
        if all(have in (want, 1, None) or want is None for have, want in pairs):
            found.append(at)
    return tuple(found)


def silent(count: Tensor, axis: int) -> Tensor:
    """Which channels have no value in a batch that has values in others.

    They give beta: as does a channel of one value, and as Keras's layer does for the zeros that
    ``Masking`` leaves. (A batch without any value is normalised as in inference mode.)
    """
    return ops.logical_and(count == 0, ops.any(count > 0, axis=axis, keepdims=True))


def by_channel(mask: Tensor, axis: int) -> bool:
    """Whether an aligned mask may exclude a value of one channel and not of another."""
    return mask.shape[axis] != 1
