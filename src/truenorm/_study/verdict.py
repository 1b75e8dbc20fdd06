"""The result of a study in sentences that a newcomer understands and a statistician accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from truenorm._records.study import Comparison, Interval, Trial
from truenorm._rewrites.place import Position


@dataclass(frozen=True)
class Outcome:
    """What the sentences are made of.

    Args:
        metric: The metric that decides.
        lower_is_better: Whether small values of it are good.
        in_points: Whether it is a share, better told in percentage points.
        best: The position with the best mean.
        winner: That one, if it is shown to differ from every other.
        means: Mean of the metric per position.
        comparisons: All pairs in that metric.
        shown: Per comparison, whether it is shown after the correction.
        equivalent: Per comparison, whether it is shown to be smaller than the margin.
        margin: The smallest difference of interest; None if there is none.
        seeds: The seeds that count.
        failed: Trials that did not finish.
        diverged: Per position, the seeds with a metric that is not a number at the end.
    """

    metric: str
    lower_is_better: bool
    in_points: bool
    best: str
    winner: str | None
    means: Mapping[str, float]
    comparisons: tuple[Comparison, ...]
    shown: tuple[bool, ...]
    equivalent: tuple[bool, ...]
    margin: float | None
    seeds: tuple[int, ...]
    failed: tuple[Trial, ...]
    diverged: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> str:
        """What is compared, in a word."""
        return "position" if set(self.means) <= set(get_args(Position)) else "variant"

    def called(self, name: str, *, first: bool = False) -> str:
        """A version in a sentence, perhaps its first word; ``none`` would be read as "no one"."""
        if name != "none" or self.kind != "position":
            return name
        return f"{'The' if first else 'the'} model without BatchNormalization"

    @property
    def noun(self) -> str:
        """The metric in words."""
        return self.metric.replace("val_", "validation ", 1).replace("_", " ")

    def amount(self, value: float) -> str:
        """A difference without its unit: in percentage points for shares."""
        return f"{100 * value:.2f}" if self.in_points else f"{value:.3g}"

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
        return [f"No {outcome.kind} has a {outcome.noun} that is a number: every run diverged."]
    level = f"{100 * mean:.2f}%" if outcome.in_points else f"{mean:.4g}"
    best = outcome.called(outcome.best, first=True)
    if len(outcome.seeds) == 1:
        only = (
            f"{best} has the best {outcome.noun} ({level}), but with 1 seed nothing can be "
            "told from chance: run the study with at least 2 seeds, better 5 or more."
        )
        return [only]
    pairs = list(zip(outcome.comparisons, outcome.shown, outcome.equivalent, strict=True))
    if outcome.winner is None:
        own = [shown for c, shown, _ in pairs if outcome.best in (c.first, c.second)]
        first = (
            f"{best} has the best mean {outcome.noun}{_of_these(outcome)} ({level}, {seeds}), but "
            f"it is not shown to {'be better than' if all(own) else 'differ from'} every other "
            f"{outcome.kind}."
        )
        return [first, *(_pair(outcome, *pair) for pair in pairs), *_flips(outcome)]
    own = [c for c in outcome.comparisons if outcome.winner in (c.first, c.second)]
    parts = [_lead(outcome, c, outcome.winner) for c in own]
    count = len(outcome.comparisons)
    first = (
        f"{best} is best: its {outcome.noun} ({level}, {seeds}) is "
        f"{' and '.join(parts)}, shown at the 5% level"
        f"{_corrected(count)} (in brackets: 95% intervals)."
    )
    small = [
        outcome.called(c.second if outcome.winner == c.first else c.first)
        for c, _, same in pairs
        if same and c in own
    ]
    if small:
        first += (
            f" The difference to {' and '.join(small)} is shown to be smaller than "
            f"{_margin(outcome)}, the smallest of interest."
        )
    return [
        first,
        *(_pair(outcome, *pair) for pair in pairs if pair[0] not in own),
        *_flips(outcome),
    ]


def _of_these(outcome: Outcome) -> str:
    """Among which the best mean is the best, where others diverged more often."""
    mean, lower = outcome.means[outcome.best], outcome.lower_is_better
    ahead = [m for m in outcome.means.values() if (m < mean if lower else m > mean)]
    return " of those that diverged least" if ahead else ""


def _lead(outcome: Outcome, comparison: Comparison, leader: str) -> str:
    """How far the leader is from the other: ``1.20 points [0.40, 2.00] above that of …``."""
    other = comparison.second if leader == comparison.first else comparison.first
    amount, higher = _distance(outcome, comparison, leader)
    called = outcome.called(other)
    whose = f"{other}'s" if called == other else f"that of {called}"
    return f"{amount} {'above' if higher else 'below'} {whose}"


def _distance(outcome: Outcome, comparison: Comparison, leader: str) -> tuple[str, bool]:
    """How far apart the two are, and whether the leader's value is the higher one."""
    difference = _seen_from(comparison, leader)
    higher = difference.mean >= 0
    return _told(outcome, difference if higher else _negative(difference)), higher


def _pair(outcome: Outcome, comparison: Comparison, shown: bool, equivalent: bool) -> str:
    leader, other, difference = comparison.first, comparison.second, comparison.difference
    if (difference.mean > 0) == outcome.lower_is_better and difference.mean != 0:
        leader, other = other, leader
    first, second = outcome.called(leader), outcome.called(other)
    start = outcome.called(leader, first=True)
    if math.isnan(difference.mean):
        return f"{start} and {second} cannot be compared: no seed has a number for both."
    amount, higher = _distance(outcome, comparison, leader)
    side = "higher" if higher else "lower"
    if shown:
        but = f", which is less than {_margin(outcome)}, the smallest of interest" * equivalent
        return (
            f"{start} is shown to be better than {second}: its {outcome.noun} is {amount} "
            f"{side}{but}."
        )
    if difference.low is None or difference.high is None:
        return f"{start} and {second} share one seed only, which shows nothing about chance."
    if difference.low == difference.high:
        if difference.mean == 0:
            return f"{start} and {second} gave the same {outcome.noun} in every seed."
        return (
            f"No difference shown between {first} and {second}: the {outcome.noun} of {first} is "
            f"{amount} {side} in each of {difference.n} seeds, which leaves no "
            "spread to test against; use more seeds or more validation data."
        )
    seen = _told(outcome, _seen_from(comparison, leader))
    if equivalent:
        return _equivalent(outcome, comparison, leader, other)
    if outcome.margin is not None and comparison.narrow is None:
        return (
            f"Not decided between {first} and {second} in {outcome.noun}: {first} minus {second} "
            f"is {seen}, but most seeds gave both the same value, so that the metric is too coarse "
            f"to show a difference smaller than {_margin(outcome)}; use more validation data."
        )
    subject = f"No difference shown between {first} and {second} in {outcome.noun}"
    if outcome.margin is not None:
        subject = (
            f"Not decided between {first} and {second} in {outcome.noun}: neither a difference nor "
            f"one smaller than {_margin(outcome)} is shown"
        )
    return (
        f"{subject}: {first} minus {second} is {seen}"
        f"{_odds(comparison, len(outcome.comparisons))}; " + _more_seeds(outcome, comparison)
    )


def _equivalent(outcome: Outcome, comparison: Comparison, leader: str, other: str) -> str:
    narrow = comparison.narrow or comparison.difference
    seen = _told(outcome, narrow if leader == comparison.first else _negative(narrow))
    first, second = outcome.called(leader), outcome.called(other)
    odds = f"p = {comparison.p_equivalent:.2g} that it is larger"
    return (
        f"{outcome.called(leader, first=True)} and {second} are equivalent within "
        f"{_margin(outcome)} in {outcome.noun}: {first} minus {second} is {seen} "
        f"(90% interval; {odds}{_corrected(len(outcome.comparisons))}; "
        f"{comparison.difference.n} seeds)."
    )


def _more_seeds(outcome: Outcome, comparison: Comparison) -> str:
    """What this number of seeds can show, and which number would be enough."""
    n = comparison.difference.n
    can = ""
    if comparison.detectable is not None and outcome.in_points and comparison.detectable > 1:
        can = f"with {n} seeds no difference is large enough to be shown in 4 of 5 studies; "
    elif comparison.detectable is not None:
        can = (
            f"with {n} seeds a true difference must be {outcome.amount(comparison.detectable)}"
            f"{outcome.unit} or more to be shown in 4 of 5 studies; "
        )
    goal = "to show a difference as large as this one"
    if outcome.margin is not None:
        goal = "to decide"
    needed = comparison.seeds_needed
    if needed is None:
        return f"{can}{goal}, a new study needs more than 1,000 seeds."
    return f"{can}{goal}, a new study needs about {needed} seeds ({max(0, needed - n)} more)."


def _margin(outcome: Outcome) -> str:
    return f"{outcome.amount(outcome.margin or 0.0)}{outcome.unit}"


def _corrected(count: int) -> str:
    return f" after Holm's correction for {count} comparisons" if count > 1 else ""


def _flips(outcome: Outcome) -> list[str]:
    """What the exact sign-flip test says of the differences that are called shown."""
    told = [
        f"{outcome.called(c.first)} and {outcome.called(c.second)} p = {c.p_flips:.2g}"
        for c, shown in zip(outcome.comparisons, outcome.shown, strict=True)
        if shown and c.p_flips is not None
    ]
    if not told:
        return []
    fewest = min(
        c.difference.n for c, s in zip(outcome.comparisons, outcome.shown, strict=True) if s
    )
    least = ""
    if fewest < 6:
        least = f" (with {fewest} seeds it cannot be below {2.0 ** (1 - fewest):.2g})"
    return [
        "The exact sign-flip test, which does not assume normal noise, gives for "
        f"{', '.join(told)}{least}."
    ]


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
    absent = [t.position for t in outcome.failed if t.position not in outcome.means]
    for position in dict.fromkeys(absent):
        reasons = {_first_line(t) for t in outcome.failed if t.position == position}
        why = "; ".join(sorted(reasons))
        name = outcome.called(position, first=True)
        notes.append(f"{name} is not compared: none of its trials finished ({why}).")
    for trial in outcome.failed:
        if trial.position in absent:
            continue
        reason = _first_line(trial)
        notes.append(
            f"Seed {trial.seed} is left out at every {outcome.kind}: its trial of "
            f"{outcome.called(trial.position)} failed ({reason})."
        )
    for position, seeds in outcome.diverged.items():
        if seeds:
            listed = ", ".join(map(str, seeds))
            notes.append(
                f"{outcome.called(position, first=True)} diverged (a metric that is not a number) "
                f"with seed {listed}; such values are left out of the means, which flatters this "
                f"{outcome.kind}."
            )
    return notes


def _first_line(trial: Trial) -> str:
    return (trial.error or "").splitlines()[0]
