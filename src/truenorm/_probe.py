"""Inputs made from a model's own specification, and the comparison of two models on them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from truenorm._errors import DataError, VerificationError

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-2, "bfloat16": 1e-1}
"""Largest relative difference of an output that rounding may explain, by compute dtype."""


def input_specification(model: Any) -> Any:
    """The symbolic inputs of the model, in the structure that its call takes."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def make_inputs(model: Any, samples: int = 4) -> Any:
    """Inputs of the model's own structure, made from its input specification.

    Floats are standard normal with a fixed seed, integers are 0 or 1. A dimension that the model
    leaves open gets 32.
    """
    generator = np.random.default_rng(0)

    def make(spec: Any) -> Any:
        batch = spec.shape[0] or samples
        shape = (batch, *(32 if d is None else d for d in spec.shape[1:]))
        if keras.backend.is_float_dtype(spec.dtype):
            return generator.normal(size=shape).astype("float32")
        return generator.integers(0, 2, size=shape).astype(spec.dtype)

    return keras.tree.map_structure(make, input_specification(model))


def outputs(model: Any, inputs: Any) -> list[np.ndarray[Any, Any]]:
    """The model's outputs in inference mode, as float64 arrays."""
    try:
        made = keras.tree.flatten(model(inputs, training=False))
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


def as_float64(tensor: Any) -> np.ndarray[Any, Any]:
    """Any backend's tensor as a NumPy float64 array."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def verify(old: Any, new: Any, inputs: Any, what: str) -> tuple[float, float]:
    """Largest absolute and relative difference of the outputs; refused if rounding cannot be why.

    The relative one is over the largest magnitude of the same output. Rounding explains what is
    within the tolerance of the narrowest dtype in which a layer computes; and, in a model that
    amplifies it, ten times what the old model itself makes of one unit in the last place of its
    inputs.
    """
    expected = outputs(old, inputs)
    absolute, relative = _largest_difference(expected, outputs(new, inputs))
    allowed = max((TOLERANCE.get(layer.compute_dtype, 0.0) for layer in old.layers), default=1e-4)
    if not relative <= allowed:  # NaN must not pass
        noise = _largest_difference(expected, outputs(old, _nudged(inputs)))[1]
        allowed = max(allowed, 10 * noise)
    if not relative <= allowed:
        raise VerificationError(
            f"{what} would change what the model computes, so no model is returned",
            where=old.name,
            expected=f"outputs equal within {allowed:.3g} relative",
            received=f"{relative:.3g} relative, {absolute:.3g} absolute",
            remedy="give a probe of your own data, and check the statistics for huge values",
        )
    return absolute, relative


def _largest_difference(
    expected: list[np.ndarray[Any, Any]], received: list[np.ndarray[Any, Any]]
) -> tuple[float, float]:
    absolute = relative = 0.0
    for a, b in zip(expected, received, strict=True):
        same = (a == b) | (np.isnan(a) & np.isnan(b))  # infinity and NaN at the same places
        with np.errstate(invalid="ignore"):
            largest = float(np.max(np.where(same, 0.0, np.abs(a - b)), initial=0.0))
        scale = float(np.max(np.abs(a[np.isfinite(a)]), initial=0.0)) or 1.0
        # np.maximum, unlike max, keeps NaN
        absolute = float(np.maximum(absolute, largest))
        relative = float(np.maximum(relative, largest / scale))
    return absolute, relative


def _nudged(inputs: Any) -> Any:
    """The inputs moved by one unit in the last place, up or down at random."""
    generator = np.random.default_rng(0)

    def nudge(x: Any) -> Any:
        x = np.asarray(x)
        if x.dtype.kind != "f":
            return x
        return np.nextafter(
            x, np.where(generator.random(x.shape) < 0.5, -np.inf, np.inf), dtype=x.dtype
        )

    return keras.tree.map_structure(nudge, inputs)
