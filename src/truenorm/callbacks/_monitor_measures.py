"""One look at the BatchNormalization layers of a model in training: two steps in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from truenorm._diagnosis.averages import output_error
from truenorm._diagnosis.tn2_parameters import gamma_of, is_constant, is_dead
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.sites import is_own_class, policy_of
from truenorm._model.values import as_float64, numbers
from truenorm._records.observation import Calls, Mode, Statistics
from truenorm._statistics.steps import Averages, Step, noise


@dataclass(frozen=True, eq=False)
class Seen:
    """The averages of all layers at one moment of a training.

    Args:
        step: How many steps of the training there were.
        averages: The averages per layer.
    """

    step: int
    averages: Mapping[Any, Averages]

    @classmethod
    def now(cls, step: int, layers: Sequence[Any]) -> Seen:
        """As they are."""
        return cls(step, {layer: Averages.of(layer) for layer in layers})


def steps_of(layer: BatchNormalizationLike, moments: Sequence[Seen], calls: int) -> list[Step]:
    """The steps of a layer's averages in a look, as far as they tell.

    Args:
        layer: The layer.
        moments: Before the look, between its steps, and after it.
        calls: How often the layer is called in one step.
    """
    if is_own_class(layer) or getattr(layer, "accumulation_steps", 1) > 1:
        return []  # what its averages are is not known, or not what one batch made of them
    pairs = [
        Step.between(layer, a.averages[layer], b.averages[layer], (b.step - a.step) * calls)
        for a, b in pairwise(moments)
    ]
    return [step for step in pairs if step is not None]


def measured(layer: BatchNormalizationLike, steps: Sequence[Step]) -> dict[str, float]:
    """What :class:`truenorm.Monitoring` has of one layer and look."""
    variance = steps[-1].batch.variance if steps else as_float64(layer.moving_variance)
    errors = [output_error(layer, k.before.mean, k.before.variance, k.batch) for k in steps]
    return {
        "distance": _size(errors) if errors else np.nan,
        "noise": noise(steps[0], steps[1]) if len(steps) > 1 else np.nan,
        "gamma": _size(gamma_of(layer)),
        "beta": np.nan if layer.beta is None else _size(as_float64(layer.beta)),
        "dead": float(np.mean(is_dead(layer) | is_constant(layer, variance))),
        "clipped": float(np.mean([k.clipped(layer) for k in steps])) if steps else np.nan,
    }


class Changes:
    """What of each layer has changed since a moment.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._before = {layer: _weights(layer) for layer in layers}

    def modes(self) -> dict[Any, Mode]:
        """What each layer has done since, as seen by what changed; from here on it is counted anew.

        A layer that normalises with the batch's statistics moves the moving ones. Of one that has
        not moved them though nothing holds it the statistics are not known: perhaps it ran in
        inference mode, perhaps not at all.
        """
        found: dict[Any, Mode] = {}
        for layer, (statistics, affine) in self._before.items():
            self._before[layer] = now = _weights(layer)
            found[layer] = mode_of(layer, now[0] != statistics, now[1] != affine)
        return found


def mode_of(layer: BatchNormalizationLike, updated: bool, learned: bool) -> Mode:
    """The mode of a layer in training, from what it has changed."""
    policy = policy_of(layer)
    used: Statistics = "unknown"
    if updated or (layer.momentum == 1 and policy in ("none", "affine")):
        used = "batch"
    elif policy in ("all", "statistics"):
        used = "moving"
    return Mode((Calls(True, bool(layer.trainable), policy, used, 1),), updated, learned)


def _weights(layer: BatchNormalizationLike) -> tuple[list[bytes], list[bytes]]:
    """The bytes of the statistics, and of gamma and beta."""
    affine = [weight for weight in (layer.gamma, layer.beta) if weight is not None]
    gathered = getattr(layer, "gathered", None)
    moving = [layer.moving_mean, layer.moving_variance]
    statistics = moving if gathered is None else [*moving, gathered]
    a, b = ([numbers(one).tobytes() for one in weights] for weights in (statistics, affine))
    return a, b


def _size(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
