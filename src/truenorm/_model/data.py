"""Data as users have it, as a stream of input batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, cast

import keras
import numpy as np

from truenorm._checks import check_integer
from truenorm._errors import DataError
from truenorm._model.graph import input_specification
from truenorm._model.values import in_memory


def input_batches(model: Any, data: Any, batch_size: int) -> Iterator[Any]:
    """The model's inputs, batch by batch; labels and sample weights are dropped."""
    for inputs, _ in labelled_batches(model, data, batch_size):
        yield inputs


def one_batch(model: Any, data: Any) -> Any:
    """Arrays as they are, or the first batch of what comes in batches; labels are dropped."""
    leaves = keras.tree.flatten(data)
    arrays = _arrays(model, data)
    unknown = not _inputs(model) and not _takes_one_array(model)
    if unknown and leaves and all(map(_is_array, leaves)):
        arrays = data  # a subclassed model does not say which of them it takes
    if arrays is not None:
        return check(model, arrays)
    for inputs in input_batches(model, data, 1):
        return inputs
    raise DataError("There is no data", where="data", expected="at least one batch")


def size_of(inputs: Any) -> int:
    """Samples in a batch, of arrays or of TensorFlow's ragged tensors, which have no ``len``."""
    first = keras.tree.flatten(inputs)[0]
    return int(first.shape[0]) if hasattr(first, "shape") else len(first)


def limited(
    batches: Iterable[Any], max_batches: int | None = None, max_samples: int | None = None
) -> Iterator[Any]:
    """The first batches, the last one cut where the samples are enough; endless data ends here."""
    left = math.inf if max_samples is None else max_samples
    for inputs in itertools.islice(batches, max_batches):
        size = size_of(inputs)
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


def number_of_batches(model: Any, data: Any, batch_size: int) -> int | None:
    """How many batches there are; None where the data does not say."""
    check_integer("batch_size", batch_size)
    arrays = _arrays(model, data)
    if arrays is not None:
        return math.ceil(size_of(arrays) / batch_size)
    try:
        return len(data) or None
    except (TypeError, ValueError):  # no length, or none that is known: tf.data's, PyDataset's
        return None


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
            expected=f"a dict of arrays with {input_names(model)}, or batches of (x, y)"
            if _takes_a_dict(model)
            else "arrays as data, or batches of (x, y)",
            received=f"data of type {type(data).__name__}",
        )
    if isinstance(data, str | PathLike):
        raise DataError(
            "This is the name of a file, and not its data",
            where="data",
            expected="arrays, a PyDataset, or an iterable of batches",
            received=repr(data),
            remedy="read it first, with numpy.load or with what wrote it",
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
        inputs = check(model, inputs)
        yield keras.tree.map_structure(_native, inputs), keras.tree.map_structure(_native, labels)


def comes_in_batches(model: Any, data: Any) -> bool:
    """Whether the data is batches already; ``fit`` mixes what is not."""
    return _arrays(model, data) is None


def check(model: Any, inputs: Any) -> Any:
    """Refuse inputs that the model cannot take, before anything runs; what it takes of them."""
    inputs, expected = _arranged(model, inputs), _inputs(model)
    leaves = keras.tree.flatten(inputs)
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
        raise DataError(
            "The data is not made of arrays",
            where="data",
            expected="NumPy arrays or tensors",
            received=", ".join(dict.fromkeys(type(leaf).__name__ for leaf in leaves)) or "nothing",
            remedy="make an array of a list: numpy.asarray(data)",
        )
    for leaf, tensor in zip(leaves, expected, strict=False):
        dtype = getattr(leaf, "dtype", None)
        if getattr(dtype, "kind", "f") in "OSUV" and tensor.dtype != "string":
            raise DataError(
                "The data is not numbers",
                where="data",
                expected=f"numbers, for an input of {tensor.dtype}",
                received=f"an array of {dtype}",
            )
    names = input_names(model)
    if isinstance(inputs, Mapping) and not {*names} <= {*cast(Mapping[str, Any], inputs)}:
        raise DataError(
            "The data lacks an input of the model",
            where="data",
            expected=f"the names {names}",
            received=f"{[*cast(Mapping[str, Any], inputs)]}",
            remedy="name the columns as the model names its inputs"
            + ("; in an .npz file x and y do as well" if len(names) == 1 else ""),
        )
    if isinstance(inputs, list | tuple) and _takes_a_dict(model):
        raise DataError(
            "The model takes its inputs by name",
            where="data",
            expected=f"a dict with {names}",
            received=f"a {type(cast(Any, inputs)).__name__}",
        )
    if not _takes(model, inputs):
        raise DataError(
            "The data does not fit the model's inputs",
            where="data",
            expected=f"shapes {_shapes(expected)}",
            received=f"{_shapes(inputs)}",
            remedy="give batches of the model's own input shape, optionally with labels: (x, y)",
        )
    return inputs


def input_names(model: Any) -> list[str]:
    """By which names a model takes its inputs; none of a subclassed model, which does not say."""
    if _takes_a_dict(model):
        return [*cast(Mapping[str, Any], input_specification(model))]
    return [tensor.name for tensor in _inputs(model)]


def _takes_a_dict(model: Any) -> bool:
    return bool(_inputs(model)) and isinstance(input_specification(model), Mapping)


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
    several = _number_of_inputs(model) > 1 and _takes(model, inputs)
    if inputs is data and isinstance(data, list | tuple) and not several:
        return None
    leaves = keras.tree.flatten(_arranged(model, inputs))
    return inputs if leaves and all(map(_is_array, leaves)) else None


def _is_array(leaf: Any) -> bool:
    """Whether this has rows that can be taken out, as pandas's frames have, which have no dtype."""
    has_numbers = hasattr(leaf, "dtype") or hasattr(leaf, "__array__")
    return has_numbers and hasattr(leaf, "shape") and hasattr(leaf, "__getitem__")


def _slices(
    model: Any, inputs: Any, labels: Any, batch_size: int, shuffle: bool
) -> Iterator[tuple[Any, Any]]:
    inputs = check(model, inputs)
    if isinstance(labels, list) and not any(hasattr(a, "shape") for a in cast(list[Any], labels)):
        labels = np.asarray(labels)
    arrays: Any = (inputs, labels)[: 1 if labels is None else 2]
    leaves = keras.tree.flatten(arrays)
    lengths = {size_of(leaf) for leaf in leaves}
    shuffle = shuffle and not any(hasattr(leaf, "flat_values") for leaf in leaves)  # ragged
    if len(lengths) != 1:
        apart = len({size_of(leaf) for leaf in keras.tree.flatten(inputs)}) > 1
        raise DataError(
            "The input arrays have different numbers of samples"
            if apart
            else "There are not as many labels as samples",
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
    return in_memory(array) if hasattr(array, "numpy") or hasattr(array, "iloc") else array


def _native(array: Any) -> Any:
    """Another framework's tensor as a NumPy array, which every backend takes."""
    return array if array is None or keras.ops.is_tensor(array) else in_memory(array)


def _inputs(model: Any) -> list[Any]:
    """The model's symbolic inputs; none for a subclassed model, which says nothing of them."""
    return list(getattr(model, "inputs", None) or ())


def _number_of_inputs(model: Any) -> int:
    """How many arrays a list of inputs has: of a subclassed model, when it was built."""
    if _inputs(model) or not model.built:
        return len(_inputs(model))
    shape = _built_for(model)
    several = isinstance(shape, list | tuple) and all(
        isinstance(one, list | tuple) for one in cast(Any, shape)
    )
    return len(shape) if several else 1


def _takes_one_array(model: Any) -> bool:
    """Whether a subclassed model was built for one array, and not for a list or dict of them."""
    shape = _built_for(model)
    return isinstance(shape, list | tuple) and all(
        size is None or isinstance(size, int) for size in cast(Any, shape)
    )


def _built_for(model: Any) -> Any:
    """The shape of the inputs that a subclassed model was built with, or the shapes; None: none."""
    return (model.get_build_config() or {}).get("input_shape")


def _arranged(model: Any, inputs: Any) -> Any:
    """Inputs given by name as the model's inputs are, other columns left out, as Keras does it."""
    expected = _inputs(model)
    if not expected or not isinstance(inputs, Mapping):
        return inputs
    named, structure = cast(Mapping[str, Any], inputs), input_specification(model)
    if isinstance(structure, Mapping):
        keys = cast(Mapping[str, Any], structure)
        return {key: named[key] for key in keys} if all(key in named for key in keys) else inputs
    if not all(tensor.name in named for tensor in expected):
        return inputs
    arranged = [named[tensor.name] for tensor in expected]
    return arranged if len(arranged) > 1 else arranged[0]


def _takes(model: Any, inputs: Any) -> bool:
    """Whether shapes fit in everything but the number of samples."""
    expected, received = _shapes(_inputs(model)), _shapes(_arranged(model, inputs))
    if expected:
        return len(expected) == len(received) and all(map(_fits, expected, received))
    number = _number_of_inputs(model)
    return number < 2 or (isinstance(inputs, list | tuple) and len(cast(Any, inputs)) == number)


def _fits(expected: tuple[int | None, ...], received: tuple[int, ...]) -> bool:
    """Whether one shape is the other; Keras adds a last axis of length one, or takes it away."""
    if len(received) == len(expected) + 1 and received[-1] == 1:
        received = received[:-1]
    elif len(received) == len(expected) - 1 and expected[-1] == 1:
        expected = expected[:-1]
    return len(expected) == len(received) and all(
        e in (None, r) for e, r in zip(expected[1:], received[1:], strict=True)
    )


def _shapes(tensors: Any) -> list[tuple[Any, ...]]:
    return [tuple(getattr(tensor, "shape", ())) for tensor in keras.tree.flatten(tensors)]
