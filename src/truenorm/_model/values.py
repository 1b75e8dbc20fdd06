"""The numbers of variables and tensors of any backend, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from truenorm._kernels import replicas


def numbers(variable: Any) -> np.ndarray[Any, Any]:
    """The numbers of a variable or tensor, in memory of their own.

    A shared buffer would change with the variable on torch, and be lost on JAX, which gives a
    variable's buffer away in a training step.
    """
    return np.array(keras.ops.convert_to_numpy(variable))


def kept(variable: Any) -> Callable[[], None]:
    """What gives a variable back the numbers that it has now, each replica's its own."""
    held = [(part, numbers(part)) for part in replicas.parts(variable)]

    def restore() -> None:
        for part, value in held:
            part.assign(value)

    return restore


def of_replicas(variable: Any) -> np.ndarray[Any, Any]:
    """A variable in float64, with a row for each replica in this process."""
    return np.stack([as_float64(part) for part in replicas.parts(variable)])


def as_float64(tensor: Any) -> np.ndarray[Any, Any]:
    """Any backend's tensor as a NumPy float64 array."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def in_memory(array: Any) -> np.ndarray[Any, Any]:
    """What a user gives as data, as a NumPy array: also a tensor on a GPU, or one that learns."""
    if keras.ops.is_tensor(array):
        array = keras.ops.convert_to_numpy(array)
    elif hasattr(array, "detach"):  # PyTorch's, while Keras has another backend
        array = array.detach().cpu()
    return np.asarray(array)
