"""Versions of a model against each other: the value of each seed, and the paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from truenorm._records.drawings.canvas import Canvas, margins, number_ticks, short
from truenorm._records.drawings.drawing import Drawing

Ends = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Columns(Drawing):
    """A column of dots per version; the dots of one seed are joined, so that pairs are seen.

    Args:
        values: Per version and seed, the value.
        unit: What the values are.
    """

    values: Mapping[str, Mapping[int, float]]
    unit: str

    def height(self, narrow: bool) -> float:  # noqa: ARG002
        """The same everywhere."""
        return 300

    def paint(self, canvas: Canvas) -> None:
        """Paint dots, the lines that join them, and a bar at each mean."""
        axes, theme = canvas.axes, canvas.theme
        canvas.quiet(self.unit, "y")
        colour = canvas.colours([*self.values])
        columns = {name: x for x, name in enumerate(self.values)}
        for seed in sorted({seed for row in self.values.values() for seed in row}):
            having = [name for name in self.values if seed in self.values[name]]
            axes.plot(
                [columns[name] for name in having],
                [self.values[name][seed] for name in having],
                color=theme["faint"],
                lw=1.1,
            )
        for name, x in columns.items():
            ys = [*self.values[name].values()]
            axes.plot([x] * len(ys), ys, "o", ms=7, c=colour[name], mec=theme["paper"], zorder=3)
            if len(ys) > 1:
                mean = math.fsum(ys) / len(ys)
                axes.plot([x - 0.2, x + 0.2], [mean, mean], color=colour[name], lw=2.4, zorder=4)
        everything = [y for row in self.values.values() for y in row.values()]
        limits = margins(min(everything), max(everything))
        axes.set_ylim(*limits)
        number_ticks(axes.yaxis, *limits)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_xticks(range(len(columns)), [""] * len(columns))
        letters = int(max(28, min(80, canvas.width / len(columns))) / 7)
        for name, x in columns.items():
            for line, part in enumerate(_halves(name)):
                canvas.below(x, line, short(part, letters))


def _halves(name: str) -> tuple[str, ...]:
    """A long name on two lines, broken behind an underscore: ``before_`` and ``activation``."""
    head, mark, tail = name.partition("_")
    return (head + mark, tail) if tail and len(name) > 8 else (name,)


@dataclass(frozen=True)
class Difference:
    """One pair: ``first`` minus ``second``.

    Args:
        first: A version.
        second: Another.
        mean: The mean difference.
        ends: The ends of its interval, if it has one.
        narrow: The ends of the interval that decides about equivalence, if one was asked for.
        shown: Whether it is shown not to be chance.
    """

    first: str
    second: str
    mean: float
    ends: Ends | None
    narrow: Ends | None
    shown: bool


@dataclass(frozen=True, kw_only=True)
class Differences(Drawing):
    """A forest plot: per pair the mean difference, its interval, and the line of no difference.

    Args:
        pairs: The pairs, from the top.
        margin: Differences smaller than this are of no interest: a band, and thick intervals.
    """

    pairs: Sequence[Difference]
    margin: float | None = None

    def height(self, narrow: bool) -> float:  # noqa: ARG002
        """Two lines per pair."""
        return 84 + 48 * len(self.pairs)

    def paint(self, canvas: Canvas) -> None:
        """Paint band, intervals, means and names."""
        axes, theme = canvas.axes, canvas.theme
        canvas.quiet("paired difference, same seeds", "x")
        ink, paper = theme["ink"], theme["paper"]
        reach = [0.0]
        if self.margin is not None:
            axes.axvspan(-self.margin, self.margin, color=theme["grid"], lw=0, zorder=0)
            reach += [-self.margin, self.margin]
        for row, pair in enumerate(self.pairs):
            if pair.ends is not None:
                axes.plot(pair.ends, [row, row], color=ink, lw=2)
                reach += pair.ends
            if pair.narrow is not None:
                axes.plot(pair.narrow, [row, row], color=ink, lw=5, zorder=2)
            reach.append(pair.mean)
            fill = ink if pair.shown else paper
            axes.plot([pair.mean], [row], "o", ms=9, mew=2, color=ink, mfc=fill, zorder=3)
            canvas.write(
                f"{short(pair.first, 20)} − {short(pair.second, 20)}",
                (0, row),
                ("axes fraction", "data"),
                shift=(0, 14),
                inside=True,
                covers=self.margin is None,
            )
        limits = margins(min(reach), max(reach))
        axes.axvline(0, color=theme["muted"], lw=1.2, zorder=1)
        axes.set_xlim(*limits)
        axes.set_ylim(len(self.pairs) - 0.5, -0.75)
        axes.set_yticks([])
        number_ticks(axes.xaxis, *limits)
        if canvas.title is None:
            canvas.below(limits[0], 1.2, "← second is higher", "left", "muted")
            canvas.below(limits[1], 1.2, "first is higher →", "right", "muted")
