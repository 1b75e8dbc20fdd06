"""Data as users have it, as a stream of input batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from truenorm._errors import DataError


def input_batches(model: Any, data: Any, batch_size: int) -> Iterator[Any]:
    """The model's inputs, batch by batch; labels and sample weights are dropped.

    ``data`` is what ``fit`` takes: arrays (``x``, ``(x, y)`` or ``(x, y, weights)``, ``x`` in the
    structure of the model's inputs), a ``keras.utils.PyDataset``, or any iterable of batches
    (``tf.data.Dataset``, PyTorch's ``DataLoader``, a list, a generator).
    """
    if isinstance(data, tuple) and 1 < len(data) <= 3 and all(_is_arrays(d) for d in data):
        data = data[0]
    if _is_arrays(data):
        yield from _slices(model, data, batch_size)
        return
    if not isinstance(data, Iterable):
        raise DataError(
            "This data cannot be read in batches",
            where="data",
            expected="arrays, a PyDataset, or an iterable of batches",
            received=type(data).__name__,
        )
    for batch in data:
        inputs = batch[0] if isinstance(batch, tuple) else batch
        check(model, inputs)
        yield inputs


def _is_arrays(data: Any) -> bool:
    if isinstance(data, dict):
        return bool(data) and all(_is_arrays(value) for value in data.values())
    return hasattr(data, "shape") and hasattr(data, "dtype") and hasattr(data, "__getitem__")


def _slices(model: Any, data: Any, batch_size: int) -> Iterator[Any]:
    lengths = {len(array) for array in keras.tree.flatten(data)}
    if len(lengths) != 1:
        raise DataError(
            "The input arrays have different numbers of samples",
            where="data",
            received=f"{sorted(lengths)}",
        )
    check(model, data)
    for start in range(0, lengths.pop(), batch_size):
        yield keras.tree.map_structure(lambda a, s=start: a[s : s + batch_size], data)


def check(model: Any, inputs: Any) -> None:
    """Refuse inputs that the model cannot take, before anything runs."""
    expected = [tuple(t.shape) for t in getattr(model, "inputs", None) or ()]
    if not expected:
        return  # a subclassed model says nothing of its inputs
    received = [tuple(np.shape(x)) for x in keras.tree.flatten(inputs)]
    if len(expected) != len(received) or not all(map(_fits, expected, received)):
        raise DataError(
            "The data does not fit the model's inputs",
            where="data",
            expected=f"shapes {expected}",
            received=f"{received}",
            remedy="give batches of the model's own input shape, optionally with labels: (x, y)",
        )


def _fits(expected: tuple[int | None, ...], received: tuple[int, ...]) -> bool:
    return len(expected) == len(received) and all(
        e in (None, r) for e, r in zip(expected, received, strict=True)
    )
