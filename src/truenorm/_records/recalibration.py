"""How far moving statistics were from the population's, and are now."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from truenorm._records.drawings.before_after import Rows, Span
from truenorm._records.drawings.drawing import Drawing, Drawn, Message
from truenorm._records.population import Population
from truenorm._records.tables import NOT_DATA, Record, Table, counted, number


@dataclass(frozen=True)
class Gap:
    """How far a layer's moving statistics are from a population.

    Args:
        path: The layer's path.
        mean: Largest ``|moving_mean - mean| / sqrt(variance + epsilon)`` over the channels: in
            standard deviations of the layer's input.
        scale: Largest ``|log2((moving_variance + epsilon) / (variance + epsilon))| / 2`` over the
            channels: in doublings of the output's scale; 0 is right, 1 is a factor of two.
    """

    path: str
    mean: float
    scale: float


@dataclass(frozen=True, repr=False)
class Recalibration(Record, Drawn):
    """Moving statistics replaced by the population's; what was before can be put back.

    Args:
        population: The statistics that the layers have now.
        before: Per layer, the gap between its old statistics and the population.
        after: Per layer, the gap that is left: rounding to the variables' dtype, and channels of
            which the data has too few values.
        undo: Call it to put the old statistics back, bit for bit.
    """

    population: Population
    before: tuple[Gap, ...]
    after: tuple[Gap, ...]
    undo: Callable[[], None] = field(repr=False, compare=False, metadata=NOT_DATA)

    def summary(self) -> str:
        """How many layers, over how much data."""
        layers, samples = len(self.before), self.population.samples
        return f"of {counted(layers, 'layer')} over {counted(samples, 'sample')}"

    def tables(self) -> Sequence[Table]:
        """One row per layer."""
        rows = tuple(
            (b.path, number(b.mean), number(a.mean, 1), number(b.scale), number(a.scale, 1))
            for b, a in zip(self.before, self.after, strict=True)
        )
        error = max(self.population.standard_errors().values(), default=None)
        title = f"Recalibrated {self.summary().removeprefix('of ')}"
        columns = (
            "layer",
            "mean was off by (std)",
            "now",
            "scale was off by (doublings)",
            "now",
        )
        notes = (
            f"Largest standard error of the statistics: {number(error, 2)} standard deviations.",
        )
        return (Table(title, columns, rows, () if error is None else notes),)

    def drawing(self) -> Drawing:
        """The gaps of each layer, before and after."""
        return gaps_drawn(self.before, self.after)


_MOST_LAYERS = 40


def gaps_drawn(before: Sequence[Gap], after: Sequence[Gap] = ()) -> Drawing:
    """How far each layer's moving statistics are from the population, before and after.

    Args:
        before: The gaps before recalibration.
        after: The gaps after it, by the same paths; may be empty.

    Returns:
        Rows with a logarithmic axis that has a place for zero. Of many layers those that were
        furthest off.
    """
    title = "Distance of the moving statistics from the population"
    if not before:
        text = "There is no layer."
        return Message(title=title, alt=text, text=text)
    worst = sorted(range(len(before)), key=lambda i: -_badness(before[i]))[:_MOST_LAYERS]
    shown = [before[i] for i in sorted(worst)]
    matching = {gap.path: gap for gap in after}
    now = [matching.get(gap.path) for gap in shown]
    notes: list[str] = [] if after else ["The moving statistics as found."]
    if len(shown) < len(before):
        notes.append(f"The {len(shown)} layers furthest off, of {len(before)}; the table has all.")
    odd = sum(not math.isfinite(g.mean + g.scale) for g in [*before, *after])
    if odd:
        notes.append(f"Gaps that are not finite numbers and are not drawn: {odd}.")

    def span(what: str, name: str, colour: str, marker: Literal["o", "D"]) -> Span:
        starts = [getattr(gap, name) for gap in shown]
        ends = [None if gap is None else getattr(gap, name) for gap in now]
        was, is_now = (f"{what}, before", f"{what}, after") if after else (what, "")
        return Span(was, is_now, starts, ends, colour, marker)

    return Rows(
        title=title,
        alt=f"Dot chart of {len(shown)} layers. Largest before: {_largest(before)}."
        + (f" Largest after: {_largest(after)}." if after else ""),
        notes=tuple(notes),
        names=[gap.path for gap in shown],
        unit="distance from the population",
        spans=[
            span("mean off by (standard deviations)", "mean", "orange", "o"),
            span("scale off by (doublings)", "scale", "blue", "D"),
        ],
    )


def _badness(gap: Gap) -> float:
    worst = max(abs(gap.mean), abs(gap.scale))
    return worst if math.isfinite(gap.mean + gap.scale) else math.inf


def _largest(rows: Sequence[Gap]) -> str:
    def most(of: Callable[[Gap], float]) -> str:
        return number(max((v for v in map(of, rows) if math.isfinite(v)), default=None))

    return f"{most(lambda g: g.mean)} standard deviations, {most(lambda g: g.scale)} doublings"
