"""Charts of records: learning curves, paired comparisons, and gaps of moving statistics.

A chart shows what its record holds and no more: runs that failed and values that are not numbers
are left out of the drawing and named in the notes below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from truenorm._errors import OptionError
from truenorm._records.recalibration import Gap
from truenorm._records.study import Comparison, Study
from truenorm._records.tables import number
from truenorm.report import _curves, _gaps, _pairs
from truenorm.report._canvas import Chart, margins, message, render, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Chart", "comparison", "gaps", "learning_curves"]

_MOST_LAYERS = 40


def learning_curves(study: Study, metric: str) -> Chart:
    """A metric over the epochs: per position the mean over the seeds, and each seed behind it.

    Args:
        study: The study.
        metric: A name in the trials' histories, such as ``val_accuracy`` or ``loss``.

    Returns:
        The chart.

    Raises:
        OptionError: No trial recorded this metric.
    """
    runs = _runs(study, metric)
    means = {p: _mean([*seeds.values()]) for p, seeds in runs.items()}
    values = np.concatenate([v for s in runs.values() for v in s.values()] or [np.zeros(0)])
    low, high = _limits(values)

    if not np.isfinite(values).any():
        return _empty(f"{metric} by epoch", study, metric, runs)

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        _curves.curves(axes, _axis_title(metric), runs, means, (low, high), narrow)

    seeds = len({seed for row in runs.values() for seed in row})
    ends = [f"{number(float(m[-1]), 4)} for {p}" for p, m in means.items() if len(m)]
    notes = ["Thick: mean over the seeds. Thin: one line per seed."] if seeds > 1 else ["One seed."]
    if metric.startswith("val_"):
        notes.append("During training, so with the moving statistics of that moment.")
    outside = int(np.sum(np.isfinite(values) & ((values < low) | (values > high))))
    if outside:
        notes.append(f"Values outside the axis, far from all others: {outside}.")
    return Chart(
        f"{metric} by epoch",
        f"Line chart of {metric} by epoch, seeds: {seeds}. Last mean: {', '.join(ends) or 'none'}.",
        *render(paint, 340, 270 + 18 * len(runs)),
        tuple(notes + _missing(study, metric, runs)),
    )


def comparison(study: Study, metric: str) -> Chart:
    """The positions against each other: the value of every seed, and the paired differences.

    Args:
        study: The study.
        metric: A name in the trials' histories and in the study's comparisons.

    Returns:
        The chart. With one position there is nothing to compare and only its values are drawn.

    Raises:
        OptionError: No trial recorded this metric.
    """
    runs = _runs(study, metric)
    finals = {(t.position, t.seed): t.final.get(metric, math.nan) for t in study.trials}
    ends = {
        p: {seed: finals[p, seed] for seed in seeds if math.isfinite(finals[p, seed])}
        for p, seeds in runs.items()
    }
    every = [c for c in study.comparisons if c.metric == metric]
    pairs = [c for c in every if math.isfinite(c.difference.mean)]
    forest = 84 + 48 * len(pairs)

    if not any(ends.values()):
        return _empty(f"{metric}: the same seeds compared", study, metric, runs)
    crowded = len(ends) > 4

    def paint(figure: Figure, narrow: bool) -> None:
        title = _axis_title(metric)
        if not pairs:
            _pairs.values(figure.add_subplot(), title, ends, 300 if narrow else 800)
            return
        if narrow or crowded:
            parts = figure.subplots(2, 1, height_ratios=[280, forest], gridspec_kw={"hspace": 0.08})
        else:
            parts = figure.subplots(1, 2, width_ratios=[1, 1.1], gridspec_kw={"wspace": 0.12})
        _pairs.values(parts[0], title, ends, 300 if narrow else 800 if crowded else 370)
        _pairs.differences(parts[1], pairs)

    judged = "recalibrated" if study.settings.get("recalibrate") else "moving"
    notes = [
        f"Values after the last epoch, with {judged} statistics: a line joins the runs of one "
        "seed, a bar is the mean."
    ]
    if pairs:
        notes.append(
            "Differences: mean and 95% interval over the seeds; filled where p < 0.05 after "
            "Holm's correction."
        )
    if any(c.difference.low is None for c in pairs):
        notes.append("One seed gives no interval.")
    if len(pairs) < len(every):
        notes.append(f"Pairs without a finite difference: {len(every) - len(pairs)}.")
    both = 300 + forest if pairs else 300
    words = "; ".join(f"{c.first} minus {c.second}: {_in_words(c)}" for c in pairs)
    return Chart(
        f"{metric}: the same seeds compared",
        f"Values of {metric} after the last epoch per position and seed, and paired differences. "
        f"{words or 'Nothing to compare'}.",
        *render(paint, both if crowded else max(300, forest), both),
        tuple(notes + _missing(study, metric, runs)),
    )


def gaps(before: Sequence[Gap], after: Sequence[Gap] = ()) -> Chart:
    """How far each layer's moving statistics are from the population, before and after.

    Args:
        before: The gaps before recalibration.
        after: The gaps after it, by the same paths; may be empty.

    Returns:
        The chart, with a logarithmic axis that has a place for zero. Of many layers those that
        were furthest off are drawn.
    """
    title = "Distance of the moving statistics from the population"
    if not before:
        return _message(title, "There is no layer.", ())
    worst = sorted(range(len(before)), key=lambda i: -_badness(before[i]))[:_MOST_LAYERS]
    shown = [before[i] for i in sorted(worst)]
    matching = {g.path: g for g in after}
    now = [matching.get(g.path) for g in shown]

    def paint(figure: Figure, narrow: bool) -> None:
        _gaps.gaps(figure, shown, now, narrow)

    notes = ["Open: before. Filled: after." if after else "The moving statistics as found."]
    if len(shown) < len(before):
        notes.append(f"The {len(shown)} layers furthest off, of {len(before)}; the table has all.")
    odd = sum(not math.isfinite(g.mean + g.scale) for g in [*before, *after])
    if odd:
        notes.append(f"Gaps that are not finite numbers and are not drawn: {odd}.")
    height = 25 * len(shown) + 84
    return Chart(
        title,
        f"Dot chart of {len(shown)} layers. Largest before: {_largest(before)}."
        + (f" Largest after: {_largest(after)}." if after else ""),
        *render(paint, height, 2 * height),
        tuple(notes),
    )


def _empty(title: str, study: Study, metric: str, runs: _curves.Runs) -> Chart:
    return _message(
        title, f"No run ended with a finite {short(metric, 20)}.", _missing(study, metric, runs)
    )


def _message(title: str, text: str, notes: Sequence[str]) -> Chart:
    return Chart(
        title, text, *render(lambda figure, _: message(figure, text), 56, 56), tuple(notes)
    )


def _runs(study: Study, metric: str) -> _curves.Runs:
    """The runs of the seeds that finished at every position: those that the study judges by."""
    known = sorted({name for trial in study.trials for name in trial.history})
    if known and metric not in known:
        raise OptionError(
            "No trial recorded this metric",
            where="metric",
            expected="one of " + ", ".join(f"'{name}'" for name in known),
            received=f"'{metric}'",
        )
    positions = dict.fromkeys([*study.summaries, *(t.position for t in study.trials)])
    runs: _curves.Runs = {p: {} for p in positions}
    for trial in study.trials:
        if trial.history.get(metric):
            runs[trial.position][trial.seed] = np.asarray(trial.history[metric], dtype=np.float64)
    common = set[int].intersection(*(set(seeds) for seeds in runs.values())) if runs else set[int]()
    return {p: {s: v for s, v in sorted(row.items()) if s in common} for p, row in runs.items()}


def _mean(lines: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean over seeds per epoch, of those that reached the epoch with a finite value."""
    padded = np.full((len(lines), max(map(len, lines), default=0)), np.nan)
    for row, line in zip(padded, lines, strict=True):
        row[: len(line)] = line
    finite = np.isfinite(padded)
    count = finite.sum(axis=0)
    total = np.where(finite, padded, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """Room for all values but those so far off that the others would be one flat line."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    first, third = np.percentile(finite, [25, 75])
    reach = 20 * (third - first)
    if reach > 0:
        finite = finite[(finite >= first - reach) & (finite <= third + reach)]
    return margins(float(finite.min()), float(finite.max()))


def _missing(study: Study, metric: str, runs: _curves.Runs) -> list[str]:
    drawn = {seed for seeds in runs.values() for seed in seeds}
    absent = sorted({t.seed for t in study.trials} - drawn)
    lost = sum(not np.isfinite(v).all() for seeds in runs.values() for v in seeds.values())
    words: list[str] = []
    if absent:
        words.append(
            "Seeds left out, as in the tables, because a run of theirs did not finish: "
            f"{', '.join(map(str, absent))}."
        )
    if lost:
        words.append(
            f"Runs in which {metric} was not a finite number in some epoch: {lost}; the means "
            "are of the other values."
        )
    return words


def _axis_title(metric: str) -> str:
    return short(metric, 34) + (" (fraction)" if "acc" in metric else "")


def _in_words(pair: Comparison) -> str:
    value = pair.difference
    if value.low is None or value.high is None:
        return number(value.mean)
    return f"{number(value.mean)}, 95% interval {number(value.low)} to {number(value.high)}"


def _badness(gap: Gap) -> float:
    worst = max(abs(gap.mean), abs(gap.scale))
    return worst if math.isfinite(gap.mean + gap.scale) else math.inf


def _largest(rows: Sequence[Gap]) -> str:
    def most(of: Callable[[Gap], float]) -> str:
        return number(max((v for v in map(of, rows) if math.isfinite(v)), default=None))

    return f"{most(lambda g: g.mean)} standard deviations, {most(lambda g: g.scale)} doublings"
