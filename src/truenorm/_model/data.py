"""Data as users have it, as a stream of input batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import keras
import numpy as np

from truenorm._checks import check_integer
from truenorm._errors import DataError


def input_batches(model: Any, data: Any, batch_size: int) -> Iterator[Any]:
    """The model's inputs, batch by batch; labels and sample weights are dropped."""
    for inputs, _ in labelled_batches(model, data, batch_size):
        yield inputs


def limited(
    batches: Iterable[Any], max_batches: int | None = None, max_samples: int | None = None
) -> Iterator[Any]:
    """The first batches, the last one cut where the samples are enough; endless data ends here."""
    left = math.inf if max_samples is None else max_samples
    for inputs in itertools.islice(batches, max_batches):
        size = len(keras.tree.flatten(inputs)[0])
        if size > left:
            inputs = keras.tree.map_structure(lambda a, n=int(left): a[:n], inputs)
        yield inputs
        left -= size
        if left <= 0:
            return


def check_limits(data: Any, max_batches: int | None, max_samples: int | None) -> None:
    """Refuse limits that are no numbers, and endless data without one."""
    for name, limit in (("max_batches", max_batches), ("max_samples", max_samples)):
        if limit is not None:
            check_integer(name, limit)
    # What a tf.data.Dataset and a PyDataset say of themselves; others cannot.
    cardinality: Any = getattr(data, "cardinality", None)
    endless = callable(cardinality) and int(cast(Any, cardinality())) == -1
    if isinstance(data, keras.utils.PyDataset):
        endless = cast(Any, data).num_batches is None
    if endless and max_batches is None and max_samples is None:
        raise DataError(
            "This data has no end",
            where="data",
            remedy="say how much of it: max_batches or max_samples; or until='converged'",
        )


def labelled_batches(
    model: Any, data: Any, batch_size: int, *, y: Any = None, shuffle: bool = False
) -> Iterator[tuple[Any, Any]]:
    """The model's inputs and their labels, batch by batch; None for labels that there are not.

    ``data`` is what ``fit`` takes: arrays (``x``, ``(x, y)`` or ``(x, y, weights)``, ``x`` in the
    structure of the model's inputs), a ``keras.utils.PyDataset``, or any iterable of batches
    (``tf.data.Dataset``, PyTorch's ``DataLoader``, a list, a generator). A batch is what the arrays
    may be, and its tuple may be a list, as PyTorch's are. ``y`` are the labels of arrays that come
    without them; ``shuffle`` mixes the samples of arrays, each time in the same way.
    """
    check_integer("batch_size", batch_size)
    arrays = _arrays(model, data)
    if arrays is not None:
        labels = y if y is not None or arrays is data else _parts(model, data)[1]
        yield from _slices(model, arrays, labels, batch_size, shuffle)
        return
    if y is not None:
        raise DataError(
            "Labels are given beside data that is not arrays",
            where="y",
            expected="arrays as data, or batches of (x, y)",
            received=f"data of type {type(data).__name__}",
        )
    if not isinstance(data, Iterable):
        raise DataError(
            "This data cannot be read in batches",
            where="data",
            expected="arrays, a PyDataset, or an iterable of batches",
            received=type(data).__name__,
        )
    for batch in cast(Iterable[Any], data):
        inputs, labels = _parts(model, batch)
        check(model, inputs)
        inputs = _arranged(model, inputs)
        yield keras.tree.map_structure(_native, inputs), keras.tree.map_structure(_native, labels)


def comes_in_batches(model: Any, data: Any) -> bool:
    """Whether the data is batches already; ``fit`` mixes what is not."""
    return _arrays(model, data) is None


def check(model: Any, inputs: Any) -> None:
    """Refuse inputs that the model cannot take, before anything runs."""
    expected, received = _shapes(_inputs(model)), _shapes(_arranged(model, inputs))
    if not _takes(model, inputs):
        raise DataError(
            "The data does not fit the model's inputs",
            where="data",
            expected=f"shapes {expected}",
            received=f"{received}",
            remedy="give batches of the model's own input shape, optionally with labels: (x, y)",
        )


def _parts(model: Any, data: Any) -> tuple[Any, Any]:
    """``x`` and ``y`` of ``(x, y)`` or ``(x, y, weights)``, if ``x`` is what the model takes."""
    if isinstance(data, list | tuple):
        parts = cast(list[Any] | tuple[Any, ...], data)
        if 1 <= len(parts) <= 3 and _takes(model, parts[0]):
            return parts[0], (parts[1] if len(parts) > 1 else None)
    return data, None


def _arrays(model: Any, data: Any) -> Any:
    """The inputs' arrays of all samples; None if the data is batches, as most lists are."""
    inputs = _parts(model, data)[0] if isinstance(data, tuple) else data
    several = len(_inputs(model)) > 1 and _takes(model, inputs)
    if inputs is data and isinstance(data, list | tuple) and not several:
        return None
    leaves = keras.tree.flatten(inputs)
    needed = ("shape", "dtype", "__getitem__")
    is_arrays = bool(leaves) and all(hasattr(leaf, name) for leaf in leaves for name in needed)
    return inputs if is_arrays else None


def _slices(
    model: Any, inputs: Any, labels: Any, batch_size: int, shuffle: bool
) -> Iterator[tuple[Any, Any]]:
    check(model, inputs)
    if isinstance(labels, list) and not any(hasattr(a, "shape") for a in cast(list[Any], labels)):
        labels = np.asarray(labels)
    arrays: Any = (_arranged(model, inputs), labels)[: 1 if labels is None else 2]
    lengths = {len(array) for array in keras.tree.flatten(arrays)}
    if len(lengths) != 1:
        raise DataError(
            "The input arrays have different numbers of samples",
            where="data",
            received=f"{sorted(lengths)}",
        )
    samples = lengths.pop()
    if shuffle:
        arrays = cast(Any, keras.tree.map_structure(_indexable, arrays))
    order = np.random.default_rng(0).permutation(samples) if shuffle else None
    for start in range(0, samples, batch_size):
        chosen: Any = slice(start, start + batch_size)
        if order is not None:
            chosen = np.sort(order[chosen])  # files want their indices in order
        batch: Any = keras.tree.map_structure(lambda a, i=chosen: _native(a[i]), arrays)
        yield batch[0], (batch[1] if len(batch) > 1 else None)


def _indexable(array: Any) -> Any:
    """TensorFlow's tensors and pandas's frames do not take a list of indices for rows."""
    return np.asarray(array) if hasattr(array, "numpy") or hasattr(array, "iloc") else array


def _native(array: Any) -> Any:
    """Another framework's tensor as a NumPy array, which every backend takes."""
    return array if array is None or keras.ops.is_tensor(array) else np.asarray(array)


def _inputs(model: Any) -> list[Any]:
    """The model's symbolic inputs; none for a subclassed model, which says nothing of them."""
    return list(getattr(model, "inputs", None) or ())


def _arranged(model: Any, inputs: Any) -> Any:
    """Inputs given by name, in the order of a model whose inputs are a list (as Keras does it)."""
    expected = _inputs(model)
    if isinstance(inputs, Mapping) and len(expected) > 1 and not isinstance(model.input, Mapping):
        named = cast(Mapping[str, Any], inputs)
        if all(tensor.name in named for tensor in expected):
            return [named[tensor.name] for tensor in expected]
    return inputs


def _takes(model: Any, inputs: Any) -> bool:
    """Whether shapes fit in everything but the number of samples."""
    expected, received = _shapes(_inputs(model)), _shapes(_arranged(model, inputs))
    return not expected or (len(expected) == len(received) and all(map(_fits, expected, received)))


def _fits(expected: tuple[int | None, ...], received: tuple[int, ...]) -> bool:
    return len(expected) == len(received) and all(
        e in (None, r) for e, r in zip(expected[1:], received[1:], strict=True)
    )


def _shapes(tensors: Any) -> list[tuple[Any, ...]]:
    return [tuple(getattr(tensor, "shape", ())) for tensor in keras.tree.flatten(tensors)]
