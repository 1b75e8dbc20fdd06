"""The numbers of variables and tensors of any backend, as NumPy arrays."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def numbers(variable: Any) -> np.ndarray[Any, Any]:
    """The numbers of a variable or tensor, in memory of their own.

    A shared buffer would change with the variable on torch, and be lost on JAX, which gives a
    variable's buffer away in a training step.
    """
    return np.array(keras.ops.convert_to_numpy(variable))


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
