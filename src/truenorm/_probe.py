"""Inputs made from a model's own specification, and the comparison of two models on them."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np

from truenorm._errors import DataError, VerificationError
from truenorm._graph import layer_paths
from truenorm.kernels.collecting import compiled

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-2, "bfloat16": 1e-1}
"""Largest relative difference of an output that rounding may explain, by compute dtype."""


_SIZES = (32, 64, 96, 128, 224, 299)
_MOST_NOISE = 1e-2
"""Above this the outputs are noise, and nothing can be shown with them."""


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
        getattr(layer, "supports_jit", True) for layer in model._flatten_layers()
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
    before, after = outputs(old, inputs), outputs(new, inputs)
    differences = [_difference(a, b) for a, b in zip(before, after, strict=True)]
    layers = layer_paths(old)
    rounding = max((TOLERANCE.get(layer.compute_dtype, 0.0) for layer in layers), default=1e-4)
    allowed = [rounding] * len(before)
    if not all(relative <= rounding for _, relative in differences):  # NaN must not pass
        noise = [
            _difference(a, b)[1] for a, b in zip(before, outputs(old, _nudged(inputs)), strict=True)
        ]
        allowed = [max(rounding, min(10 * n, _MOST_NOISE)) for n in noise]
    for (absolute, relative), most in zip(differences, allowed, strict=True):
        if not relative <= most:
            raise VerificationError(
                f"{what} would change what the model computes, so no model is returned",
                where=old.name,
                expected=f"outputs equal within {most:.3g} relative",
                received=f"{relative:.3g} relative, {absolute:.3g} absolute",
                remedy="give a probe of your own data, and check the statistics for huge values",
            )
    return max((a for a, _ in differences), default=0.0), max(
        (r for _, r in differences), default=0.0
    )


def _difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Largest absolute difference, and the same over the largest finite magnitude of ``a``."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # infinity and NaN at the same places
    with np.errstate(invalid="ignore"):
        absolute = float(np.max(np.where(same, 0.0, np.abs(a - b)), initial=0.0))
    scale = float(np.max(np.abs(a[np.isfinite(a)]), initial=0.0)) or 1.0
    return absolute, absolute / scale


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
