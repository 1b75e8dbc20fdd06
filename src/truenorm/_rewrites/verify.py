"""The proof that a rewrite kept the function: outputs of both models on the same inputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from truenorm._errors import VerificationError
from truenorm._model.graph import layer_paths
from truenorm._model.probe import outputs

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-2, "bfloat16": 1e-1}
"""Largest relative difference of an output that rounding may explain, by compute dtype."""


_MOST_NOISE = 1e-2
"""Above this the outputs are noise, and nothing can be shown with them."""


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
