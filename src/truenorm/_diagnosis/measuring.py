r"""A model run over a data set: what its layers see as in training, and what it answers then.

Every BatchNormalization normalises with what it has in training (the batch's statistics, or its
moving ones where it is frozen), with its moving statistics as in inference, or with the
population's, as after :func:`truenorm.recalibrate`. Everything else in the model runs in inference
mode, so that what differs is BatchNormalization's doing alone. The data is read twice: for the
population, of which every batch is a part, and for what the model does with some of the batches;
and these are read once more where only then a rule asks what recalibration would change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np

from truenorm._diagnosis.loss import Judge
from truenorm._errors import DataError
from truenorm._model.data import size_of
from truenorm._model.values import as_float64
from truenorm._records.moments import Array, Moments
from truenorm._records.population import Population
from truenorm._statistics.fixed_point import Sample
from truenorm._statistics.runner import Run, Runner, Use
from truenorm._statistics.tally import Pass, Tally

When = Literal["in_training", "in_inference", "recalibrated"]
"""Which statistics normalise."""

Batches = Callable[[], Iterable[tuple[Any, Any]]]
"""Reads the data once more: inputs and labels, batch by batch."""

COMPARED = 32
"""On how many batches inference is compared with training. A rule about the loss asks for a mean
difference of three standard errors: of 32 batches, half the standard deviation between them."""

Scores = Mapping[str, Array]
"""The loss and the metrics that the model is compiled with, one value per batch."""


@dataclass(frozen=True)
class Seen:
    """What the BatchNormalization layers see in training.

    Args:
        training: The population of each site's input.
        calls: Per path, the moments of each call of the layer in one run of the model.
        scores: What the judge says; empty if there are no labels, no loss, or one that these labels
            do not make.
        shuffled: What they see of some batches whose samples are drawn from all of the data; None
            where the batches were drawn at random already.
    """

    training: Population
    calls: Mapping[str, tuple[Moments, ...]]
    scores: Scores
    shuffled: Pass | None


@dataclass(frozen=True)
class Answers:
    """What the model gives, depending on the statistics that normalise.

    Args:
        change: Root mean square of ``output(in_inference) - output(recalibrated)`` over the
            standard deviation of ``output(recalibrated)``; the largest over the model's outputs; 0
            where one of them was not asked for.
        scores: As in :class:`Seen`.
        sizes: Samples per batch.
        batches: Which batches of the data these are of.
        inputs: What each site sees in inference, as it is and, if asked for, once recalibrated.
    """

    change: float
    scores: Mapping[When, Scores]
    sizes: Array
    batches: tuple[int, ...]
    inputs: Mapping[When, Mapping[str, Moments]]


def look(
    runner: Runner, use: Use, batches: Batches, judge: Judge | None, shuffled: int = 0
) -> Seen:
    """The first reading of the data; of so many batches more, each of samples drawn from all."""
    tally, run, sample = Tally(runner.slices), runner.using(use), Sample(shuffled)
    scores: list[dict[str, float]] = []
    for inputs, labels in _not_empty(batches):
        made = run(inputs)
        tally.add(made)
        scores.append({} if judge is None else judge.scores(made.outputs, labels))
        if shuffled:
            sample.draw(inputs)
    seen = tally.seen()
    if not seen.samples:
        raise no_data()
    return Seen(
        Population(seen.sites, seen.samples, seen.batches, "batch", 1, seen.spread),
        tally.turns(),
        _by_name(scores),
        runner.one_pass(sample.batches(), use) if shuffled else None,
    )


def ask(
    runner: Runner, uses: Mapping[When, Use], batches: Batches, judge: Judge | None, there_are: int
) -> Answers:
    """The second reading of the data: the answers in inference, and perhaps once recalibrated."""
    chosen = {*np.linspace(0, there_are - 1, min(there_are, COMPARED)).astype(int).tolist()}
    asked: list[int] = []
    runs: dict[When, Callable[[Any], Run]] = {w: runner.using(use) for w, use in uses.items()}
    tallies: dict[When, Tally] = {when: Tally(runner.slices) for when in uses}
    scores: dict[When, list[dict[str, float]]] = {when: [] for when in uses}
    sums: dict[int, _Sum] = defaultdict(_Sum)
    sizes: list[int] = []
    for number, (inputs, labels) in enumerate(_not_empty(batches)):
        if number not in chosen:
            continue
        asked.append(number)
        outputs: dict[When, list[Any]] = {}
        for when, run in runs.items():
            made = run(inputs)
            tallies[when].add(made)
            scores[when].append({} if judge is None else judge.scores(made.outputs, labels))
            outputs[when] = keras.tree.flatten(made.outputs)
        for index, pair in enumerate(zip(*outputs.values(), strict=True)):
            if len(pair) > 1:
                sums[index].add(*pair)
        sizes.append(size_of(inputs))
    if not asked:
        raise DataError(
            "The data gave nothing when it was read again",
            where="data",
            expected="data that can be read several times",
            remedy="give a list of its batches",
        )
    return Answers(
        max((s.change for s in sums.values()), default=0.0),
        {when: _by_name(found) for when, found in scores.items()},
        np.asarray(sizes, np.float64),
        tuple(asked),
        {when: tally.seen().sites for when, tally in tallies.items()},
    )


def no_data() -> DataError:
    """What is said of data without a sample."""
    return DataError(
        "There is no data to take statistics of",
        where="data",
        expected="at least one sample",
        received="none",
    )


def _not_empty(batches: Batches) -> Iterator[tuple[Any, Any]]:
    return (batch for batch in batches() if size_of(batch[0]))


def _by_name(scores: list[dict[str, float]]) -> dict[str, Array]:
    """One array per name; nothing if a batch could not be scored."""
    names = scores[0] if scores and all(scores) else {}
    return {name: np.asarray([one[name] for one in scores]) for name in names}


class _Sum:
    """Sums over one of the model's outputs, in inference and recalibrated."""

    def __init__(self) -> None:
        self.squares, self.moments = 0.0, Moments.zero(1)

    def add(self, inference: Any, recalibrated: Any) -> None:
        a, b = as_float64(inference), as_float64(recalibrated)
        self.squares += float(np.square(a - b).sum())
        self.moments = self.moments.merge(Moments.of(b.reshape(-1, 1)))

    @property
    def change(self) -> float:
        """Root mean square difference in standard deviations; NaN for one that never varies."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.sqrt(np.float64(self.squares) / self.moments.m2[0]))
