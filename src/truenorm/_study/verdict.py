"""The result of a study in sentences that a newcomer understands and a statistician accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from truenorm._records.study import Comparison, Interval, Trial


@dataclass(frozen=True)
class Outcome:
    """The outcome of a study, of which the sentences are made.

    Args:
        metric: The metric that decides.
        lower_is_better: Whether small values of it are good.
        best: The position with the best mean.
        winner: That one, if it is shown to differ from every other.
        means: Mean of the metric per position.
        comparisons: All pairs in that metric.
        shown: Per comparison, whether it is shown after the correction.
        seeds: The seeds that count.
        failed: Trials that did not finish.
        diverged: Per position, the seeds with a metric that is not a number at the end.
    """

    metric: str
    lower_is_better: bool
    best: str
    winner: str | None
    means: Mapping[str, float]
    comparisons: tuple[Comparison, ...]
    shown: tuple[bool, ...]
    seeds: tuple[int, ...]
    failed: tuple[Trial, ...]
    diverged: Mapping[str, tuple[int, ...]]

    @property
    def noun(self) -> str:
        """The metric in words."""
        return self.metric.replace("val_", "validation ", 1).replace("_", " ")

    def amount(self, value: float) -> str:
        """A difference without its unit: in percentage points for accuracies."""
        return f"{100 * value:.2f}" if self.in_points else f"{value:.3g}"

    @property
    def in_points(self) -> bool:
        """Whether the metric is a share, better told in percentage points."""
        return "acc" in self.metric

    @property
    def unit(self) -> str:
        """What follows a difference."""
        return " points" if self.in_points else ""


def sentences(outcome: Outcome) -> tuple[str, ...]:
    """The verdict: the winner or the best, every pair that matters, and what was left out."""
    return (*_result(outcome), *_left_out(outcome))


def _result(outcome: Outcome) -> list[str]:
    seeds = f"{len(outcome.seeds)} seed" + "s" * (len(outcome.seeds) != 1)
    mean = outcome.means[outcome.best]
    if math.isnan(mean):
        return [f"No position has a {outcome.noun} that is a number: every run diverged."]
    level = f"{100 * mean:.2f}%" if outcome.in_points else f"{mean:.4g}"
    if len(outcome.seeds) == 1:
        only = (
            f"{outcome.best} has the best {outcome.noun} ({level}), but with 1 seed nothing can be "
            "told from chance: run the study with at least 2 seeds, better 5 or more."
        )
        return [only]
    pairs = list(zip(outcome.comparisons, outcome.shown, strict=True))
    if outcome.winner is None:
        first = (
            f"{outcome.best} has the best mean {outcome.noun} ({level}, {seeds}), but it is not "
            "shown to differ from every other position."
        )
        return [first, *(_pair(outcome, c, shown) for c, shown in pairs)]
    own = [c for c in outcome.comparisons if outcome.winner in (c.first, c.second)]
    parts = [_lead(outcome, c, outcome.winner) for c in own]
    count = len(outcome.comparisons)
    correction = f" after Holm's correction for {count} comparisons" if count > 1 else ""
    first = (
        f"{outcome.winner} is best: its {outcome.noun} ({level}, {seeds}) is "
        f"{' and '.join(parts)}, shown at the 5% level{correction} (in brackets: 95% intervals)."
    )
    return [first, *(_pair(outcome, c, shown) for c, shown in pairs if c not in own)]


def _lead(outcome: Outcome, comparison: Comparison, leader: str) -> str:
    """How far the leader is from the other: ``1.20 points [0.40, 2.00] above none's``."""
    other = comparison.second if leader == comparison.first else comparison.first
    difference = _seen_from(comparison, leader)
    below = difference.mean < 0
    if below:
        difference = _negative(difference)
    side = "below" if below else "above"
    return f"{_told(outcome, difference)} {side} {other}'s"


def _pair(outcome: Outcome, comparison: Comparison, shown: bool) -> str:
    first, second, difference = comparison.first, comparison.second, comparison.difference
    if math.isnan(difference.mean):
        return f"{first} and {second} cannot be compared: no seed has a number for both."
    if (difference.mean > 0) == outcome.lower_is_better and difference.mean != 0:
        first, second = second, first
    if shown:
        lead = _lead(outcome, comparison, first)
        return f"{first} is shown to be better than {second}: its {outcome.noun} is {lead}."
    if difference.low is None or difference.high is None:
        return f"{first} and {second} share one seed only, which shows nothing about chance."
    if difference.low == difference.high:
        if difference.mean == 0:
            return f"{first} and {second} gave the same {outcome.noun} in every seed."
        return (
            f"No difference shown between {first} and {second}: it is the same in each of "
            f"{difference.n} seeds ({_told(outcome, difference)}), which leaves no spread to test "
            "against; use more seeds or more validation data."
        )
    half = outcome.amount((difference.high - difference.low) / 2)
    seen = _told(outcome, _seen_from(comparison, first))
    return (
        f"No difference shown between {first} and {second} in {outcome.noun}: {first} minus "
        f"{second} is {seen}{_odds(comparison, len(outcome.comparisons))}; with {difference.n} "
        f"seeds a difference smaller than about {half}{outcome.unit} would go unseen."
    )


def _odds(comparison: Comparison, count: int) -> str:
    """The p-values, said where the interval alone would mislead: it is not corrected."""
    if comparison.p_value is None or comparison.p_adjusted is None or comparison.p_value >= 0.05:
        return ""
    return (
        f" (p = {comparison.p_value:.2g} alone, {comparison.p_adjusted:.2g} after Holm's "
        f"correction for {count} comparisons)"
    )


def _seen_from(comparison: Comparison, position: str) -> Interval:
    difference = comparison.difference
    return difference if position == comparison.first else _negative(difference)


def _negative(value: Interval) -> Interval:
    low = None if value.high is None else -value.high
    high = None if value.low is None else -value.low
    return Interval(-value.mean, low, high, value.n)


def _told(outcome: Outcome, value: Interval) -> str:
    text = f"{outcome.amount(value.mean)}{outcome.unit}"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{outcome.amount(value.low)}, {outcome.amount(value.high)}]"


def _left_out(outcome: Outcome) -> list[str]:
    notes: list[str] = []
    for trial in outcome.failed:
        reason = (trial.error or "").splitlines()[0]
        notes.append(
            f"Seed {trial.seed} is left out at every position: its {trial.position} trial failed "
            f"({reason})."
        )
    for position, seeds in outcome.diverged.items():
        if seeds:
            listed = ", ".join(map(str, seeds))
            notes.append(
                f"{position} diverged (a metric that is not a number) with seed {listed}; such "
                "values are left out of the means, which flatters this position."
            )
    return notes
