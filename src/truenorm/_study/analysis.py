"""What the trials of a study show: summaries, paired comparisons, and a verdict in words.

The seed is the unit of observation. A seed counts only if its trial finished at every position, so
that all positions are judged by the same seeds, and the difference of two positions within a seed
is free of what the seed alone decides. A metric's value is that of the last epoch: the best epoch
would be chosen with the data that judges it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from truenorm._errors import StudyError
from truenorm._records.study import (
    Comparison,
    Interval,
    Study,
    Trial,
    is_share,
    lower_is_better,
    possible,
)
from truenorm._study.equivalence import two_one_sided
from truenorm._study.power import detectable, planned
from truenorm._study.sign_flips import sign_flip
from truenorm._study.verdict import Outcome, sentences

LEVEL = 0.05
"""A difference is called shown if its adjusted p-value is below this."""

Values = Mapping[str, Mapping[str, np.ndarray]]
"""Per metric, per position: the last epoch's value of each seed (same order of seeds)."""


def analyse(
    trials: Iterable[Trial],
    *,
    positions: Sequence[str],
    name: str,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
    margin: float | None = None,
) -> Study:
    """Judge the trials.

    Args:
        trials: In any order. The same position and seed twice counts once.
        positions: The positions to compare, in the order of the tables.
        name: Title of the study.
        settings: Goes into the record as it is.
        notes: Sentences to add to the verdict.
        margin: The smallest difference of interest in the deciding metric, in its units.

    Raises:
        StudyError: Fewer than two positions have a finished trial, or no seed finished at all
            positions that have one.
    """
    every = _unique(trials, positions)
    positions = _finished(every, positions)
    seeds = _common_seeds(every, positions)
    metric, metrics = _metrics(t for t in every if t.error is None)
    of = {(t.position, t.seed): t.final for t in every}
    values: Values = {
        m: {p: np.array([of[p, seed].get(m, math.nan) for seed in seeds]) for p in positions}
        for m in metrics
    }
    summaries = {
        p: {m: student(values[m][p][np.isfinite(values[m][p])])[0] for m in metrics}
        for p in positions
    }
    comparisons = tuple(
        c for m in metrics for c in compare(m, values[m], margin if m == metric else None)
    )
    lower = lower_is_better(metric)
    best = _best(values[metric], summaries, metric, lower)
    deciding = tuple(c for c in comparisons if c.metric == metric)
    own = [c for c in deciding if best in (c.first, c.second)]
    sound = bool(np.isfinite(values[metric][best]).all())
    winner = best if sound and own and all(is_shown(c) for c in own) else None
    if not all(_is_better(best, c, lower) for c in own):  # where others diverged more often
        winner = None
    found = Study(
        name=name,
        settings=dict(settings),
        trials=every,
        summaries=summaries,
        comparisons=comparisons,
        metric=metric,
        best=best,
        winner=winner,
        verdict=(),
        margin=margin,
    )
    return replace(found, verdict=(*verdict(found), *notes))


def verdict(study: Study) -> tuple[str, ...]:
    """The sentences that a record leads to; nothing but the record decides them."""
    deciding = tuple(possible(study, c) for c in study.comparisons if c.metric == study.metric)
    metrics = tuple(dict.fromkeys(name for row in study.summaries.values() for name in row))
    seeds = _common_seeds(study.trials, tuple(study.summaries))
    ends = {(t.position, t.seed): t.final for t in study.trials}
    outcome = Outcome(
        metric=study.metric,
        lower_is_better=lower_is_better(study.metric),
        in_points=is_share(study, study.metric),
        best=study.best,
        winner=study.winner,
        means={p: row[study.metric].mean for p, row in study.summaries.items()},
        comparisons=deciding,
        shown=tuple(is_shown(c) for c in deciding),
        equivalent=tuple(is_equivalent(c) for c in deciding),
        margin=study.margin,
        seeds=seeds,
        failed=tuple(t for t in study.trials if t.error is not None),
        diverged={
            p: tuple(
                seed
                for seed in seeds
                if not all(math.isfinite(ends[p, seed].get(m, math.nan)) for m in metrics)
            )
            for p in study.summaries
        },
    )
    return sentences(outcome)


def is_shown(comparison: Comparison) -> bool:
    """Whether this difference is shown at the level, after the correction."""
    return comparison.p_adjusted is not None and comparison.p_adjusted < LEVEL


def is_equivalent(comparison: Comparison) -> bool:
    """Whether the difference is shown to be smaller than the margin, after the correction."""
    return comparison.p_equivalent is not None and comparison.p_equivalent < LEVEL


def _is_better(position: str, comparison: Comparison, lower: bool) -> bool:
    """Whether this position has the better mean of the two."""
    ahead = (
        comparison.difference.mean if position == comparison.first else -comparison.difference.mean
    )
    return ahead < 0 if lower else ahead > 0


def student(values: np.ndarray) -> tuple[Interval, float | None]:
    """Mean of values, its 95% interval, and the two-sided p-value of a mean of zero.

    Student's t-test of one sample; of the differences of pairs it is the paired t-test.

    Where it has no answer: without values the mean is NaN; with one there is no interval and no
    p-value. Values all equal have an interval of no width: if they are zero, p is 1; if not, there
    is none, since a spread of exactly zero says that the metric is too coarse or the seeds too
    few, not that chance is impossible.
    """
    from scipy import stats

    n = len(values)
    if n < 2:
        return Interval(float(values[0]) if n else math.nan, None, None, n), None
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    if spread <= 1e-9 * abs(mean):  # equal but for rounding in the subtraction
        return Interval(mean, mean, mean, n), 1.0 if mean == 0 else None
    test: Any = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    return Interval(mean, float(low), float(high), n), float(test.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    r"""P-values adjusted for being several, so that any false one among them has the level's odds.

    .. math:: \tilde p_{(i)} = \max_{j \le i}\, \min\big(1, (m - j + 1)\, p_{(j)}\big)

    with :math:`p_{(1)} \le \dots \le p_{(m)}`. S. Holm, "A simple sequentially rejective multiple
    test procedure", Scandinavian Journal of Statistics 6 (1979). A missing p-value stays missing
    and counts in m as the largest.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[i] = largest
    return adjusted


def compare(
    metric: str, values: Mapping[str, np.ndarray], margin: float | None = None
) -> tuple[Comparison, ...]:
    """Every pair of positions over the seeds where both have a finite value, corrected together.

    Tests for a difference are one family, those for equivalence another: in each the odds of any
    false conclusion are at most the level.
    """
    pairs = list(combinations(values, 2))
    differences = [_paired(values[first], values[second]) for first, second in pairs]
    tests = [student(d) for d in differences]
    adjusted = holm([p for _, p in tests])
    same = [(None, None) if margin is None else two_one_sided(d, margin) for d in differences]
    p_equivalent = holm([p for _, p in same])
    level = LEVEL / max(1, len(pairs))
    found: list[Comparison] = []
    for i, (first, second) in enumerate(pairs):
        (difference, p_value), n = tests[i], len(differences[i])
        spread = float(np.std(differences[i], ddof=1)) if n > 1 and p_value is not None else 0.0
        found.append(
            Comparison(
                metric,
                first,
                second,
                difference,
                p_value,
                adjusted[i],
                p_flips=sign_flip(differences[i]) if n > 1 else None,
                narrow=same[i][0],
                p_equivalent=p_equivalent[i],
                detectable=detectable(spread, n, level),
                seeds_needed=planned(difference.mean, spread, n, margin=margin, level=level),
            )
        )
    return tuple(found)


def _paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The differences in the seeds where both have a finite value."""
    finite = np.isfinite(first) & np.isfinite(second)
    return first[finite] - second[finite]


def _unique(trials: Iterable[Trial], positions: Sequence[str]) -> tuple[Trial, ...]:
    """One trial per position and seed, a finished one before a failed one, in a fixed order."""
    found: dict[tuple[int, int], Trial] = {}
    for trial in trials:
        if trial.position not in positions:
            continue
        key = (positions.index(trial.position), trial.seed)
        if key not in found or (found[key].error is not None and trial.error is None):
            found[key] = trial
    return tuple(found[key] for key in sorted(found))


def _finished(trials: Sequence[Trial], positions: Sequence[str]) -> Sequence[str]:
    """The positions that have a finished trial, if these are enough to compare; else all."""
    done = {t.position for t in trials if t.error is None}
    finished = [p for p in positions if p in done]
    return finished if len(finished) > 1 else positions


def _common_seeds(trials: Sequence[Trial], positions: Sequence[str]) -> tuple[int, ...]:
    done = {p: {t.seed for t in trials if t.position == p and t.error is None} for p in positions}
    common = set[int].intersection(*done.values())
    if common:
        return tuple(sorted(common))
    failed = [t for t in trials if t.error is not None]
    empty = [p for p in positions if not done[p]]
    first = next((t for t in failed if t.position in empty), failed[0] if failed else None)
    if empty:
        problem = f"No trial of {' and of '.join(empty)} finished"
    else:
        problem = "No seed finished at every position, so there is nothing to compare"
    raise StudyError(
        problem,
        where=None if first is None else f"{first.position}, seed {first.seed}",
        expected="at least one seed that finishes at every position",
        received="no trial" if first is None else f"{len(failed)} failed; the first: {first.error}",
        remedy="mend the cause and run the study again: finished trials are kept",
    )


def _metrics(trials: Iterable[Trial]) -> tuple[str, tuple[str, ...]]:
    """The metric that decides, and those to report: that one and ``val_loss``."""
    names = list(next(iter(trials)).final)
    others = [n for n in names if not n.endswith("loss")]
    metric = "val_accuracy" if "val_accuracy" in others else next(iter(others), "val_loss")
    return metric, tuple(dict.fromkeys((metric, "val_loss")))


def _best(
    values: Mapping[str, np.ndarray],
    summaries: Mapping[str, Mapping[str, Interval]],
    metric: str,
    lower: bool,
) -> str:
    """The position with the fewest seeds that are not finite, and of these the best mean."""

    def rank(position: str) -> tuple[int, float]:
        mean = summaries[position][metric].mean
        lost = int((~np.isfinite(values[position])).sum())
        return lost, math.inf if math.isnan(mean) else mean if lower else -mean

    return min(values, key=rank)
