"""Inputs made from a model's own specification, and its outputs on inputs."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np

from truenorm._errors import DataError
from truenorm._keras_internals import layers_in
from truenorm._kernels.sums import compiled
from truenorm._model.values import as_float64

_SIZES = (32, 64, 96, 128, 224, 299)


def input_specification(model: Any) -> Any:
    """The symbolic inputs of the model, in the structure that its call takes."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def make_inputs(model: Any, samples: int = 4) -> Any:
    """Inputs of the model's own structure, made from its input specification.

    Floats are standard normal with a fixed seed, integers are 0 or 1. A dimension that the model
    leaves open gets the least of a few common sizes for which all shapes work out.
    """
    generator = np.random.default_rng(0)
    specification = input_specification(model)

    def shape_of(spec: Any, size: int) -> tuple[int, ...]:
        return (spec.shape[0] or samples, *(d or size for d in spec.shape[1:]))

    def make(spec: Any) -> Any:
        shape = shape_of(spec, size)
        if keras.backend.is_float_dtype(spec.dtype):
            return generator.normal(size=shape).astype("float32")
        return generator.integers(0, 2, size=shape).astype(spec.dtype)

    size = _SIZES[0]
    for size in _SIZES if any(None in t.shape[1:] for t in model.inputs) else ():
        shapes = keras.tree.map_structure(lambda t, s=size: shape_of(t, s), specification)
        with contextlib.suppress(ValueError, RuntimeError):  # too small for the model's strides
            model.compute_output_shape(shapes)
            break
    return keras.tree.map_structure(make, specification)


def outputs(model: Any, inputs: Any) -> list[np.ndarray[Any, Any]]:
    """The model's outputs in inference mode, as float64 arrays."""

    def forward(state: list[Any], inputs: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(model.variables, state, strict=True))):
            return model(inputs, training=False)

    # As one program on JAX, which else compiles every operation by itself: five times slower.
    jit = keras.config.backend() == "jax" and all(
        getattr(layer, "supports_jit", True) for layer in layers_in(model)
    )
    state = [keras.ops.convert_to_tensor(variable) for variable in model.variables]
    try:
        made = keras.tree.flatten(_tried(compiled(forward, jit), forward, state, inputs))
    except (ValueError, TypeError) as error:
        raise DataError(
            "The model does not take this input",
            expected=str(
                keras.tree.map_structure(lambda t: tuple(t.shape), input_specification(model))
            ),
            received=str(keras.tree.map_structure(np.shape, inputs)),
            remedy="give data of the model's input shape",
        ) from error
    return [as_float64(y) for y in made]


def _tried(program: Any, function: Any, *arguments: Any) -> Any:
    """The program's result; that of the function if it cannot be one program."""
    try:
        return program(*arguments)
    except Exception:  # what a model may do in a call() of its own is not known
        return function(*arguments)
