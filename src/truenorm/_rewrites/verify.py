"""The proof that a rewrite kept the function: at each changed place, and of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import keras
import numpy as np

from truenorm._errors import DataError, VerificationError
from truenorm._kernels import run_time
from truenorm._model.data import one_batch
from truenorm._model.edit import Edit
from truenorm._model.graph import Call, Graph, graph_of, layer_paths
from truenorm._model.hooks import intercepted
from truenorm._model.probe import make_inputs, outputs
from truenorm._model.progress import Line
from truenorm._model.values import in_memory
from truenorm._records.moments import Array
from truenorm._rewrites.verify_places import Place, compared_places, shaken

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-2, "bfloat16": 1e-1}
"""Largest relative difference that rounding may explain, by compute dtype."""

_MOST_NOISE = 1e-2
"""Above this the outputs are noise, and nothing can be shown with them."""


class Proof(NamedTuple):
    """What was compared, in the order of the fields of a Rewrite.

    Args:
        max_abs_error: Of the outputs; None if they could not be had.
        max_rel_error: The same over the largest magnitude of an output.
        max_site_error: At a changed place, over the range of the channel; None if there is none.
        notes: What the comparison could not show.
    """

    max_abs_error: float | None
    max_rel_error: float | None
    max_site_error: float | None
    notes: tuple[str, ...]


def verify(
    graph: Graph,
    edit: Edit,
    between: Collection[Call],
    new: Any,
    probe: Any,
    what: str,
    line: Line,
    more: Callable[..., list[Place]] = lambda **_: [],
) -> Proof:
    """Compare the old and the new model; refused if rounding cannot be why they differ.

    In full precision, else a GPU's rounding of products would hide what is compared.

    Args:
        graph: Of the old model.
        edit: What was done to it.
        between: The calls whose output is meant to be another one.
        new: The new model.
        probe: Inputs of the whole model; None for made-up ones.
        what: The start of a sentence about the rewrite: "Folding".
        line: Says what is being compared.
        more: Compares further places: ``more(only_rounding=...)``.
    """
    with run_time.full_precision():
        old = graph.model
        line.step("comparing each changed place")
        rounding = max(
            (TOLERANCE.get(k.compute_dtype, 0.0) for k in layer_paths(old)), default=1e-4
        )

        def places(only_rounding: bool) -> list[Place]:
            found = compared_places(graph, edit, between, only_rounding=only_rounding)
            return found + more(only_rounding=only_rounding)

        site_error = _verify_places(places, rounding, what)
        if probe is None and graph_of(old) is None:
            return Proof(None, None, site_error, (_NOT_KNOWN + _BY_ITSELF,))
        inputs = make_inputs(old) if probe is None else one_batch(old, probe)
        line.step("comparing the outputs")
        try:
            before = outputs(old, inputs)
        except DataError:
            if probe is not None:
                raise
            return Proof(None, None, site_error, (_NOT_RUN + _BY_ITSELF,))

        def moved() -> list[Array]:
            with intercepted({*edit, *(call.operation for call in between)}, _with_rounding):
                return outputs(old, _nudged(inputs))

        after, problem = outputs(new, inputs), _PROBLEM.format(what)
        absolute, relative = _verify_outputs(before, after, moved, rounding, problem, old.name)
        shows = any(_varies(output, rounding) for output in before)
        return Proof(
            absolute, relative, site_error, () if shows else (_SHOWS_NOTHING + _BY_ITSELF,)
        )


_PROBLEM = "{} would change what the model computes, so no model is returned"
_NOT_RUN = (
    "The outputs were not compared, since the model does not run on made-up inputs: give a probe "
    "of your own data. "
)
_NOT_KNOWN = (
    "The outputs were not compared, since nobody knows what a subclassed model takes: give a probe "
    "of your own data. "
)
_SHOWS_NOTHING = (
    "The outputs show nothing of the change: on this probe they are the same for all samples, or "
    "not finite. "
)
_BY_ITSELF = "Each changed site was compared by itself, on random numbers."


def _verify_places(
    compared: Callable[[bool], list[Place]], rounding: float, what: str
) -> float | None:
    """The largest difference at a changed place, over the range of its channel."""
    places = compared(False)
    allowed = [rounding * place.extent for place in places]
    if not all((p.difference <= most).all() for p, most in zip(places, allowed, strict=True)):
        allowed = [
            most + 10 * noise.difference
            for most, noise in zip(allowed, compared(True), strict=True)
        ]
    errors: list[float] = []
    for place, most in zip(places, allowed, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            error = float(np.nanmax(place.difference / place.extent, initial=0.0))
        if not (place.difference <= most).all():
            raise VerificationError(
                _PROBLEM.format(what),
                where=place.path,
                expected=f"each channel equal within {rounding:.3g} of its range",
                received=f"{error:.3g}",
                remedy="report this as a fault of truenorm, with the model",
            )
        errors.append(error)
    return max(errors, default=None)


def _verify_outputs(
    before: list[Array],
    after: list[Array],
    moved: Callable[[], list[Array]],
    rounding: float,
    problem: str,
    where: str,
) -> tuple[float, float]:
    """Largest absolute and relative difference of the outputs.

    The relative one is over the largest magnitude of the same output. Rounding explains what is
    within the tolerance of the narrowest dtype in which a layer computes; and, in a model that
    amplifies it, ten times what the old model itself makes of one unit in the last place of its
    inputs and of what the changed layers put out.
    """
    differences = [_difference(a, b) for a, b in zip(before, after, strict=True)]
    allowed = [rounding] * len(before)
    if not all(relative <= rounding for _, relative in differences):  # NaN must not pass
        noise = [_difference(a, b)[1] for a, b in zip(before, moved(), strict=True)]
        allowed = [max(rounding, min(10 * n, _MOST_NOISE)) for n in noise]
    for (absolute, relative), most in zip(differences, allowed, strict=True):
        if not relative <= most:
            raise VerificationError(
                problem,
                where=where,
                expected=f"outputs equal within {most:.3g} relative",
                received=f"{relative:.3g} relative, {absolute:.3g} absolute",
                remedy="give a probe of your own data, and check the statistics for huge values",
            )
    return max((a for a, _ in differences), default=0.0), max(
        (r for _, r in differences), default=0.0
    )


def _with_rounding(_: Any, original: Any, inputs: Any, **arguments: Any) -> Any:
    return shaken(original(inputs, **arguments))


def _varies(output: Array, rounding: float) -> bool:
    """Whether an output is another one for other inputs, by more than rounding."""
    finite = np.isfinite(output)
    values = output if len(output) > 1 else output.reshape(-1, 1)  # a batch of one has its elements
    with np.errstate(invalid="ignore"):
        ranges = np.where(np.isfinite(values).all(axis=0), np.ptp(values, axis=0), 0.0)
    largest = np.max(np.abs(output[finite]), initial=0.0)
    return bool((ranges > rounding * largest).any())


def _difference(a: Array, b: Array) -> tuple[float, float]:
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
        x = in_memory(x)
        if x.dtype.kind != "f":
            return x
        return np.nextafter(
            x, np.where(generator.random(x.shape) < 0.5, -np.inf, np.inf), dtype=x.dtype
        )

    return keras.tree.map_structure(nudge, inputs)
