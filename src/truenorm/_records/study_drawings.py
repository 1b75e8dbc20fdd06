# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""What a study looks like: learning curves, values per seed, paired differences, statistics.

A drawing shows what its record holds and no more: runs that failed and values that are not numbers
are left out of it and named in its notes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from truenorm._errors import OptionError
from truenorm._records.drawings.before_after import Rows, Span
from truenorm._records.drawings.canvas import margins, short
from truenorm._records.drawings.curves import Curves, Line
from truenorm._records.drawings.drawing import Drawing, Message
from truenorm._records.drawings.pairs import Columns, Difference, Differences
from truenorm._records.study import is_share, possible, possible_mean
from truenorm._records.tables import number

if TYPE_CHECKING:
    from truenorm._records.study import Comparison, Interval, Study, Trial

Curve = NDArray[np.float64]
Runs = dict[str, dict[int, Curve]]
"""Per position and seed, the metric after each epoch."""


def curves(study: Study, metric: str, *, bands: bool = False) -> Drawing:
    """A metric over the epochs: per position the mean over the seeds, and each seed behind it.

    What the study judges by stands beside the curves where it is not where they end: with
    recalibrated statistics.

    Args:
        study: The study.
        metric: A name in the trials' histories, such as ``val_accuracy`` or ``loss``.
        bands: Draw the 95% interval of the mean in place of each seed's line.

    Raises:
        OptionError: No trial recorded this metric.
    """
    runs = _runs(study, metric)
    title = f"{metric} by epoch"
    every = [v for seeds in runs.values() for v in seeds.values()]
    values = np.concatenate([*every, np.zeros(0)])
    if not np.isfinite(values).any():
        return _empty(title, study, metric, runs)
    judged = _judged(study, metric)
    lines = {
        name: _line([*seeds.values()], judged.get(name), bands) for name, seeds in runs.items()
    }
    results = [one for end in judged.values() for one in (end.mean, end.low, end.high)]
    known = np.array([r for r in results if r is not None], dtype=np.float64)
    low, high = _limits(np.concatenate([values, known]))
    notes = _notes_of_curves(runs, metric, bands=bands, judged=bool(judged))
    outside = int(np.sum(np.isfinite(values) & ((values < low) | (values > high))))
    if outside:
        notes.append(f"Values outside the axis, far from all others: {outside}.")
    return Curves(
        title=title,
        alt=_curves_in_words(metric, runs, lines, judged),
        notes=(*notes, *_missing(study, metric, runs)),
        lines=lines,
        unit=_unit(study, metric),
        result="judged" if judged else "",
        limits=(low, high),
    )


def _judged(study: Study, metric: str) -> Mapping[str, Interval]:
    """Means of what the study judges by, where that is not what the curves show."""
    if not study.settings.get("recalibrate"):
        return {}
    rows = {
        name: possible_mean(study, name, metric)
        for name, row in study.summaries.items()
        if metric in row
    }
    return {name: value for name, value in rows.items() if math.isfinite(value.mean)}


def _line(seeds: Sequence[Curve], judged: Interval | None, bands: bool) -> Line:
    padded = np.full((len(seeds), max(map(len, seeds), default=0)), np.nan)
    for row, values in zip(padded, seeds, strict=True):
        row[: len(values)] = values
    mean = _mean(padded)
    return Line(
        np.arange(1.0, padded.shape[1] + 1),
        mean,
        behind=tuple(seeds) if len(seeds) > 1 and not bands else (),
        band=_band(padded, mean) if bands else None,
        result=None if judged is None else (judged.mean, judged.low, judged.high),
    )


def _notes_of_curves(runs: Runs, metric: str, *, bands: bool, judged: bool) -> list[str]:
    seeds = len({seed for row in runs.values() for seed in row})
    notes = ["Thick: mean over the seeds. Thin: one line per seed."] if seeds > 1 else ["One seed."]
    if seeds > 1 and bands:
        notes = ["Line: mean over the seeds. Band: its 95% interval."]
    if metric.startswith("val_"):
        notes.append("The lines are of the training, with the moving statistics of that moment.")
    if judged:
        notes.append(
            "Diamonds: what the study judges by, the same weights as at the end of the line with "
            "recalibrated statistics" + (", and its 95% interval." if seeds > 1 else ".")
        )
    return notes


def _curves_in_words(
    metric: str, runs: Runs, lines: Mapping[str, Line], judged: Mapping[str, Interval]
) -> str:
    seeds = len({seed for row in runs.values() for seed in row})
    ends = [f"{number(float(m.y[-1]), 4)} for {p}" for p, m in lines.items() if len(m.y)]
    text = f"Line chart of {metric} by epoch, seeds: {seeds}. Last mean: {', '.join(ends)}."
    if judged:
        results = [f"{number(value.mean, 4)} for {name}" for name, value in judged.items()]
        text += f" Judged with recalibrated statistics: {', '.join(results)}."
    return text


def values(study: Study, metric: str) -> Drawing:
    """The value of every seed after the last epoch, in a column per position.

    Raises:
        OptionError: No trial recorded this metric.
    """
    runs = _runs(study, metric)
    finals = {(t.position, t.seed): t.final.get(metric, math.nan) for t in study.trials}
    ends = {
        name: {seed: finals[name, seed] for seed in seeds if math.isfinite(finals[name, seed])}
        for name, seeds in runs.items()
    }
    title = f"{metric} of every seed"
    if not any(ends.values()):
        return _empty(title, study, metric, runs)
    judged = "recalibrated" if study.settings.get("recalibrate") else "moving"
    return Columns(
        title=title,
        alt=f"Values of {metric} after the last epoch per position and seed.",
        notes=(
            f"Values after the last epoch, with {judged} statistics: a line joins the runs of one "
            "seed, a bar is the mean.",
            *_missing(study, metric, runs),
        ),
        values=ends,
        unit=_unit(study, metric),
    )


def differences(study: Study, metric: str) -> Drawing:
    """The paired differences of all positions, with their intervals.

    Raises:
        OptionError: No trial recorded this metric.
    """
    runs = _runs(study, metric)
    every = [possible(study, c) for c in study.comparisons if c.metric == metric]
    pairs = [c for c in every if math.isfinite(c.difference.mean)]
    title = f"{metric}: paired differences"
    if not pairs:
        return Message(title=title, alt="Nothing to compare.", text="There is nothing to compare.")
    margin = study.margin if metric == study.metric else None
    notes = [
        "Differences: mean and 95% interval over the seeds; filled where p < 0.05 after "
        "Holm's correction."
    ]
    if margin is not None:
        notes.append(
            f"The shaded band is the margin of ±{number(margin)}: where the thick line, the 90% "
            "interval, lies inside it, the two are equivalent (p < 0.05 before Holm's correction)."
        )
    if any(c.difference.low is None for c in pairs):
        notes.append("One seed gives no interval.")
    if len(pairs) < len(every):
        notes.append(f"Pairs without a finite difference: {len(every) - len(pairs)}.")
    words = "; ".join(f"{c.first} minus {c.second}: {_in_words(c)}" for c in pairs)
    return Differences(
        title=title,
        alt=f"Paired differences of {metric}. {words}.",
        notes=(*notes, *_missing(study, metric, runs)),
        pairs=[_difference(c) for c in pairs],
        margin=margin,
    )


def _difference(pair: Comparison) -> Difference:
    shown = pair.p_adjusted is not None and pair.p_adjusted < 0.05
    ends, narrow = _ends(pair.difference), None if pair.narrow is None else _ends(pair.narrow)
    return Difference(pair.first, pair.second, pair.difference.mean, ends, narrow, shown)


def _ends(value: Interval) -> tuple[float, float] | None:
    return None if value.low is None or value.high is None else (value.low, value.high)


def statistics(study: Study, metric: str) -> Drawing:
    """What the statistics alone change: every trained model, before and after recalibration.

    Raises:
        OptionError: No trial recorded this metric.
    """
    _runs(study, metric)  # refuses a metric that nobody recorded
    trials = recalibrated(study, metric)
    title = f"{metric} of the same weights, before and after recalibration"
    if not trials:
        text = "No model was judged with recalibrated statistics."
        return Message(title=title, alt=text, text=text)
    before = [trial.history[metric][-1] for trial in trials]
    after = [trial.final[metric] for trial in trials]
    return Rows(
        title=title,
        alt=(
            f"Dot chart of {len(trials)} trained models. With moving statistics {metric} is from "
            f"{number(min(before), 4)} to {number(max(before), 4)}, recalibrated from "
            f"{number(min(after), 4)} to {number(max(after), 4)}."
        ),
        names=[f"{trial.position}, seed {trial.seed}" for trial in trials],
        unit=_unit(study, metric),
        spans=[Span("moving statistics, as trained", "recalibrated", before, after, "orange")],
        log=False,
    )


def recalibrated(study: Study, metric: str) -> list[Trial]:
    """The trials with BatchNormalization that have this metric with both statistics."""
    return [
        trial
        for trial in study.trials
        if trial.error is None
        and trial.skew_before is not None
        and math.isfinite(trial.final.get(metric, math.nan))
        and math.isfinite(trial.history.get(metric, (math.nan,))[-1])
    ]


def _empty(title: str, study: Study, metric: str, runs: Runs) -> Message:
    text = f"No run ended with a finite {short(metric, 20)}."
    return Message(title=title, alt=text, text=text, notes=tuple(_missing(study, metric, runs)))


def _runs(study: Study, metric: str) -> Runs:
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
    runs: Runs = {p: {} for p in positions}
    for trial in study.trials:
        if trial.history.get(metric):
            runs[trial.position][trial.seed] = np.asarray(trial.history[metric], dtype=np.float64)
    common = set[int].intersection(*(set(seeds) for seeds in runs.values())) if runs else set[int]()
    return {p: {s: v for s, v in sorted(row.items()) if s in common} for p, row in runs.items()}


def _mean(padded: Curve) -> Curve:
    """The mean over seeds per epoch, of those that reached the epoch with a finite value."""
    finite = np.isfinite(padded)
    count = finite.sum(axis=0)
    total = np.where(finite, padded, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _band(padded: Curve, mean: Curve) -> tuple[Curve, Curve]:
    """The 95% interval of the mean at each epoch, over the seeds that reached it."""
    from scipy import stats

    finite = np.where(np.isfinite(padded), padded, np.nan)
    count = np.isfinite(padded).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.nansum((finite - mean) ** 2, axis=0) / (count - 1)
        half = stats.t.ppf(0.975, np.maximum(count - 1, 1)) * np.sqrt(variance / count)
    half = np.where(count > 1, half, np.nan)
    return mean - half, mean + half


def _limits(values: Curve) -> tuple[float, float]:
    """Room for all values but those so far off that the others would be one flat line."""
    finite = values[np.isfinite(values)]
    first, third = np.percentile(finite, [25, 75])
    reach = 20 * (third - first)
    if reach > 0:
        finite = finite[(finite >= first - reach) & (finite <= third + reach)]
    return margins(float(finite.min()), float(finite.max()))


def _missing(study: Study, metric: str, runs: Runs) -> list[str]:
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


def _unit(study: Study, metric: str) -> str:
    return short(metric, 34) + (" (fraction)" if is_share(study, metric) else "")


def _in_words(pair: Comparison) -> str:
    value = pair.difference
    if value.low is None or value.high is None:
        return number(value.mean)
    return f"{number(value.mean)}, 95% interval {number(value.low)} to {number(value.high)}"
