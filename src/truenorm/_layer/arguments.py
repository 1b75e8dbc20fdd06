"""What the constructor of the layer refuses, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import keras
import numpy as np

from truenorm._checks import check_integer, is_number, meant
from truenorm._errors import DataError, OptionError

FreezePolicy = Literal["none", "all", "statistics", "affine"]

_CLIPPING = ("rmin", "rmax", "dmax")


def check_average(momentum: Any, epsilon: Any) -> None:
    """Refuse a momentum outside 0 to 1, and an epsilon below 0."""
    if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
        raise OptionError(
            "`momentum` must be the weight of the old moving statistics of BatchNormalization",
            expected="a number from 0 to 1, or None for the mean over all batches",
            received=repr(momentum),
        )
    if not (is_number(epsilon) and epsilon >= 0):
        raise OptionError(
            "The epsilon of BatchNormalization is added to a variance",
            expected="a number of 0 or more",
            received=repr(epsilon),
        )


def check_identifiers(
    axis: Any,
    initializers: Mapping[str, Any],
    regularizers: Mapping[str, Any],
    constraints: Mapping[str, Any],
) -> None:
    """Refuse an axis that is no number, and names that Keras does not know."""
    single: Any = next(iter(cast(Any, axis)), None) if isinstance(axis, list | tuple) else axis
    try:
        int(single)
    except (TypeError, ValueError) as error:
        raise OptionError(
            "The axis of BatchNormalization is a number",
            where="axis",
            expected="an integer: -1 for the last axis, 1 for channels first",
            received=repr(axis),
        ) from error
    for module, given in (
        (keras.initializers, initializers),
        (keras.regularizers, regularizers),
        (keras.constraints, constraints),
    ):
        for argument, name in given.items():
            if isinstance(name, str):
                _check_name(module, argument, name)


def _check_name(module: Any, argument: str, name: str) -> None:
    try:
        module.get(name)
    except ValueError as error:
        raise OptionError(
            "Keras has nothing of this name",
            where=argument,
            expected=f"a name of keras.{module.__name__.rpartition('.')[2]}",
            received=repr(name),
            remedy=meant(name, dir(module)),
        ) from error


def check_axis(axis: Any, rank: int, where: str | None) -> None:
    """Refuse an axis that the input does not have."""
    if not -rank <= axis < rank:
        raise OptionError(
            "The input of BatchNormalization does not have this axis",
            where=where,
            expected=f"an axis from {-rank} to {rank - 1}",
            received=repr(axis),
        )


def activation_of(given: Any) -> Any:
    """The function that a name stands for; None for none, and for what changes nothing."""
    try:
        found = keras.activations.get(given)
    except (ValueError, TypeError) as error:
        raise OptionError(
            "Keras has no such activation",
            where="activation",
            expected="a name such as relu, or a function",
            received=repr(given),
            remedy=meant(given, dir(keras.activations)),
        ) from error
    return None if found is keras.activations.linear else found


def synchronized_of(given: Any) -> bool | tuple[str, ...]:
    """Whether replicas go together, or over which axes of JAX's devices they do."""
    if isinstance(given, bool | np.bool_):
        return bool(given)
    names: Any = [given] if isinstance(given, str) else given
    if names and isinstance(names, list | tuple):
        names = tuple(cast(Any, names))
        if all(isinstance(name, str) and name for name in names):
            return names
    raise OptionError(
        "`synchronized` says whether the replicas of BatchNormalization go together",
        expected="True, False, or names of axes of devices, as 'batch'",
        received=repr(given),
    )


def check_renorm(renorm: bool, clipping: Mapping[str, float | None] | None) -> None:
    """Refuse limits of the correction that are unknown or contradict each other."""
    if not renorm:
        return
    given = {name: value for name, value in (clipping or {}).items() if value is not None}
    problem = None
    if not set(clipping or {}) <= set(_CLIPPING):
        problem = "Received invalid keys in the renorm_clipping of BatchNormalization"
    elif given.get("rmin", 0.0) > given.get("rmax", float("inf")):
        problem = "In the renorm_clipping of BatchNormalization rmax should be rmin or more"
    elif given.get("dmax", 0.0) < 0:
        problem = "In the renorm_clipping of BatchNormalization dmax should be non-negative"
    if problem is not None:
        raise OptionError(
            problem,
            expected="rmin and rmax with rmin <= rmax, and dmax of 0 or more; each may be missing",
            received=repr(clipping),
        )


def check_ghosts(size: Any, others: Mapping[str, Any]) -> None:
    """Refuse a size that is no positive integer, and options that ghost batches exclude."""
    if size is None:
        return
    check_integer("virtual_batch_size", size)
    for name, chosen in others.items():
        if chosen:
            raise OptionError(
                f"BatchNormalization has both virtual_batch_size and {name}",
                expected="one of the two: they ask for different statistics of the same batch",
                received=f"virtual_batch_size={size}, {name}={chosen!r}",
            )


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse misspelt names of truenorm's own arguments; all others are left to Keras."""
    ours = [*known, "name", "dtype", "trainable"]
    for name in given:
        remedy = None if name in ours else meant(name, ours, alike=0.8)
        if remedy is not None:
            raise OptionError("BatchNormalization has no such argument", where=name, remedy=remedy)


def check_domains(domains: Any, affine: bool) -> None:
    """Refuse a number of domains that is no positive integer, and domain_affine without domains."""
    if domains is not None:
        check_integer("domains", domains)
    elif affine:
        raise OptionError(
            "BatchNormalization has domain_affine, and no domains",
            expected="both or neither: it gives each domain gamma and beta of its own",
            received="domain_affine=True, domains=None",
        )


def check_samples(layer: Any, input_shape: Sequence[int | None]) -> None:
    """Refuse channels in the first axis where something else is made of its samples."""
    if layer.axis % len(input_shape) != 0:
        return
    for option, parts in (("virtual_batch_size", "Ghost batches"), ("domains", "Domains")):
        if getattr(layer, option) is not None:
            raise OptionError(
                f"{parts} are parts of the first axis, and here that holds the channels",
                where=layer.path,
                expected=f"another channel axis than 0, or no {option}",
                received=f"axis={layer.axis}, {option}={getattr(layer, option)}",
            )


def check_added(add: Any, inputs: Any, where: str | None) -> None:
    """Refuse what cannot be added to the output number by number."""
    theirs, ours = tuple(add.shape), tuple(inputs.shape)
    if hasattr(inputs, "flat_values") != hasattr(add, "flat_values"):
        raise DataError(
            "What BatchNormalization is to add is dense beside a ragged input, or ragged beside a "
            "dense one",
            where=where,
            expected="both ragged or both dense",
            received=f"add of shape {theirs}",
        )
    if len(theirs) != len(ours) or any(
        None not in pair and pair[0] != pair[1] for pair in zip(theirs, ours, strict=True)
    ):
        raise DataError(
            "What BatchNormalization is to add is not of the shape of its output",
            where=where,
            expected=f"shape {ours}",
            received=f"add of shape {theirs}",
        )


def check_policy(policy: Any) -> None:
    """Refuse what is no freeze policy."""
    if policy not in get_args(FreezePolicy):
        raise OptionError(
            "There is no such freeze policy of BatchNormalization",
            where="freeze",
            expected="one of " + ", ".join(map(repr, get_args(FreezePolicy))),
            received=repr(policy),
            remedy=meant(policy, get_args(FreezePolicy)),
        )
