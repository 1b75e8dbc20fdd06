"""What a study refuses before it starts: bad options, bad data, a model that it cannot use."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, cast

import keras
import numpy as np

from truenorm._backends import Backend
from truenorm._checks import check_integer, is_number, meant
from truenorm._errors import DataError, MissingDependencyError, ModelError, OptionError
from truenorm._model.data import check
from truenorm._model.graph import calls, is_batch_normalization
from truenorm._model.sites import position as position_of
from truenorm._records.tables import counted
from truenorm._rewrites.place import Position, place
from truenorm._study.folder import NAMES, Arrays

_STALE = 0.01  # the most that initial values may weigh in the final moving statistics


def check_backend(backend: str) -> None:
    """See that the trials can run on this backend, and scipy can judge them."""
    if backend not in list(Backend):
        raise OptionError(
            "This backend cannot train models",
            where="backend",
            expected=f"one of {', '.join(Backend)}",
            received=repr(backend),
            remedy=meant(backend, Backend),
        )
    for module, extra in (("scipy", "study"), ("cloudpickle", "study"), (backend, backend)):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(
                f"The study needs {module}, which is not installed",
                where="backend" if module == backend else None,
                remedy=f"pip install 'truenorm[{extra}]'",
            )


def check_positions(positions: Sequence[str]) -> tuple[str, ...]:
    """The positions: two or more, each once. Whether they exist is for ``place`` to say."""
    names = () if isinstance(positions, str) else tuple(positions)
    if len(names) < 2 or len(set(names)) < len(names):
        raise OptionError(
            "A study compares two or more positions",
            where="positions",
            expected="a sequence of different positions",
            received=repr(positions),
            remedy="for example ('before_activation', 'after_activation')",
        )
    return names


def check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds as a tuple."""
    if not isinstance(seeds, Sequence):
        return tuple(range(check_integer("seeds", seeds)))
    numbers = tuple(check_integer("every seed", seed, least=0) for seed in seeds)
    if not numbers or max(numbers) >= 2**32 or len(set(numbers)) < len(numbers):
        raise OptionError(
            "seeds must be a positive integer, or different integers from 0 to 2**32 - 1",
            received=repr(seeds),
        )
    return numbers


def check_timeout(value: float | None) -> None:
    """Refuse a time limit that is not a positive number of seconds."""
    if value is not None and not (is_number(value) and math.isfinite(value) and value > 0):
        raise OptionError(
            "timeout must be a positive number of seconds, or None for no limit",
            received=repr(value),
        )


def check_margin(margin: float | None) -> None:
    """See that this is None or a difference."""
    if margin is not None and not (is_number(margin) and math.isfinite(margin) and margin > 0):
        raise OptionError(
            "The margin is not a difference",
            where="margin",
            expected="the smallest difference of interest, more than 0, in the metric's units; or "
            "None",
            received=repr(margin),
            remedy="give for example 0.005 for half a point of accuracy: within a margin of 0 "
            "nothing is ever equivalent",
        )


def check_threshold(threshold: Any) -> None:
    """See that this is None or a value of the metric."""
    if threshold is not None and not is_number(threshold):
        raise OptionError(
            "The threshold is not a value of the metric",
            where="threshold",
            expected="a number, or None",
            received=repr(threshold),
        )


def check_runner(runner: Any) -> None:
    """See that this names a runner."""
    if not isinstance(runner, str):
        raise OptionError(
            "There is no such runner",
            where="runner",
            expected="'local', 'here', 'ray', or the address of a Ray cluster",
            received=repr(runner),
        )


def check_model(model: Any, x: np.ndarray | None) -> None:
    """See that ``build`` gave a compiled model that takes these inputs; ``place`` checks the rest.

    Args:
        model: What ``build`` returned.
        x: Inputs, samples first; None if they are not known here.
    """
    if not isinstance(model, keras.Model) or not model.compiled:
        is_model = isinstance(model, keras.Model)
        raise ModelError(
            "The function did not build a compiled model",
            where="build",
            expected="a compiled keras.Model",
            received="a model that is not compiled" if is_model else type(model).__name__,
            remedy="call model.compile(...) in it and return the model",
        )
    if x is not None:
        check(model, x)


def check_placement(model: Any, positions: Sequence[str]) -> tuple[str, ...]:
    """Refuse positions that no site can take; returns a sentence about sites that cannot be moved.

    That is better known now than after hours of training.
    """
    notes: list[str] = []
    for wanted in positions:
        placed = place(model, cast(Position, wanted)).model
        sites = [call for call in calls(placed) if is_batch_normalization(call.operation)]
        # before_layer: directly before an activation, too; named so if not behind a linear layer
        before = ("before_activation", "before_layer")
        right = before if wanted in before else (wanted,)
        stray = [call.path for call in sites if position_of(call) not in right]
        if stray and len(stray) == len(sites) and wanted != "none":
            raise ModelError(
                f"No BatchNormalization of this model can be put at {wanted}",
                where=stray[0],
                expected="a BatchNormalization that directly follows or precedes an activation",
                received=f"{counted(len(stray), 'site')}, none of that kind",
                remedy=f"see what truenorm.place(model, '{wanted}') says about each site",
            )
        if stray:
            listed = ", ".join(stray[:5]) + (" …" if len(stray) > 5 else "")
            sites_left = counted(len(stray), "BatchNormalization site")
            notes.append(
                f"At {wanted}, {sites_left} could not be placed, and nothing is changed there: "
                f"{listed}."
            )
    return tuple(notes)


def check_momentum(model: Any, steps: int) -> tuple[str, ...]:
    r"""A sentence, if the moving statistics cannot be true after so few steps.

    A moving average that starts at :math:`v_0` still holds it with the weight
    :math:`m^{\text{steps}}` at the end, :math:`m` being the momentum.
    """
    layers = [c.operation for c in calls(model) if is_batch_normalization(c.operation)]
    # (None is the mean over all batches, which does not keep its start.)
    momentum = max((float(layer.momentum or 0) for layer in layers), default=0.0)
    weight = momentum**steps
    if weight <= _STALE:
        return ()
    enough = math.floor(100 * _STALE ** (1 / steps)) / 100
    return (
        f"Caution: after {steps} steps with momentum {momentum:g}, {100 * weight:.0f}% of the "
        "moving statistics are still their initial values, and validation is measured with them. "
        "This, not the position, may decide against BatchNormalization: build the model with "
        f"momentum {enough:g} or less, or train longer.",
    )


def check_data(data: Any) -> tuple[Arrays, Arrays]:
    """The data as two pairs of arrays, or a DataError that says what is wrong with it."""
    try:
        (x_train, y_train), (x_val, y_val) = data
    except (TypeError, ValueError):
        raise DataError(
            "The data is not two pairs of arrays",
            where="data",
            expected="((x_train, y_train), (x_val, y_val))",
            received=type(data).__name__,
            remedy="give the training pair and the validation pair",
        ) from None
    for name, array in zip(NAMES, (x_train, y_train, x_val, y_val), strict=False):
        _check_array(name, array)
    for part, x, y in (("training", x_train, y_train), ("validation", x_val, y_val)):
        if len(x) != len(y):
            raise DataError(
                f"The {part} inputs and targets have different lengths",
                where="data",
                expected="one target per sample",
                received=f"{counted(len(x), 'input')}, {counted(len(y), 'target')}",
                remedy="cut them to the same samples",
            )
    for name, first, second in (("inputs", x_train, x_val), ("targets", y_train, y_val)):
        if first.shape[1:] != second.shape[1:]:
            raise DataError(
                f"The training and validation {name} have different shapes",
                where="data",
                expected=f"(samples, {', '.join(map(str, first.shape[1:]))})",
                received=f"{second.shape}",
                remedy="prepare both in the same way",
            )
    return (x_train, y_train), (x_val, y_val)


def _check_array(name: str, array: Any) -> None:
    if not isinstance(array, np.ndarray):
        problem, received = "This is not a NumPy array", type(array).__name__
    elif array.dtype.kind not in "biuf":
        problem, received = "This array does not hold real numbers", f"dtype {array.dtype}"
    elif array.ndim == 0 or array.size == 0:
        problem, received = "This array is empty", f"shape {array.shape}"
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        problem, received = "This array has NaN or infinity in it", f"{bad} such values"
    else:
        return
    raise DataError(
        problem,
        where=f"data: {name}",
        expected="a NumPy array of finite numbers, samples first",
        received=received,
        remedy="convert or clean it before the study",
    )
