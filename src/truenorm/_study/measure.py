"""What a trial measures beside its metrics: time, memory, and what folding saves."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from truenorm._errors import TruenormError
from truenorm._keras_internals import layers_in
from truenorm._model.graph import is_batch_normalization
from truenorm._records.recalibration import Gap
from truenorm._rewrites.fold import fold

_RUNS = 15


class Clock(keras.callbacks.Callback):
    """Times the training steps; the first two of a training compile and warm up."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self._times: list[float] = []
        self._begun = 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.steps += 1
        self._times.append(time.perf_counter() - self._begun)

    @property
    def median(self) -> float | None:
        """The median time of a step, in seconds."""
        times = self._times[2:] or self._times
        return statistics.median(times) if times else None


def sites(model: Any) -> int:
    """How many BatchNormalization layers a model has."""
    return sum(is_batch_normalization(layer) for layer in layers_in(model))


@dataclass(frozen=True)
class Costs:
    """What inference costs.

    Args:
        foldable: How many BatchNormalization can be folded.
        left: Why the others cannot.
        predict: Median time of ``predict`` on one batch, in seconds.
        folded: The same for the folded model.
    """

    foldable: int | None = None
    left: tuple[str, ...] = ()
    predict: float | None = None
    folded: float | None = None


def costs(model: Any, batch: Any) -> Costs:
    """Fold a copy of the model and time both; what cannot be folded at all says why."""
    if not sites(model):
        (time_now,) = _medians((model,), batch)
        return Costs(0, (), time_now)
    try:
        done = fold(model, probe=batch, progress=False)
    except TruenormError as error:
        (time_now,) = _medians((model,), batch)
        return Costs(0, (str(error),), time_now)
    left = tuple(f"{site.path}: {site.reason}" for site in done.left)
    times = _medians((model, done.model), batch)
    return Costs(len(done.changed), left, *times)


def _medians(models: Sequence[Any], batch: Any) -> list[float]:
    """Each model's median time, run in turn, so that a drift of the machine hits all."""
    found: list[list[float]] = [[] for _ in models]
    for run in range(_RUNS + 1):
        for model, times in zip(models, found, strict=True):
            start = time.perf_counter()
            model.predict_on_batch(batch)
            if run:  # the first compiles
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


def peak_memory() -> int | None:
    """Peak memory of this process, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def largest(gaps: Sequence[Gap]) -> float | None:
    """The largest of all distances of moving statistics from the population's."""
    return max((max(gap.mean, gap.scale) for gap in gaps), default=None)
