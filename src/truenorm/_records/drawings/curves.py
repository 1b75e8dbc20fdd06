"""Lines over time: learning curves, or anything else that is measured again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from truenorm._records.drawings.canvas import Canvas, margins, number_ticks, short
from truenorm._records.drawings.drawing import Drawing
from truenorm._records.tables import number

Values = NDArray[np.float64]
End = tuple[float, float | None, float | None]
"""A value and the ends of its interval."""

_MOST = 8
"""Of more lines than this only the first and the last are named."""


@dataclass(frozen=True)
class Line:
    """One line, and what stands around it.

    Args:
        x: When.
        y: The values; those that are not finite leave a gap.
        behind: Thin lines of the same colour, as of single seeds, each over the first of ``x``.
        band: The ends of an interval around ``y``.
        result: What came out in the end, by another measure than ``y``; drawn beside the lines.
    """

    x: Values
    y: Values
    behind: tuple[Values, ...] = ()
    band: tuple[Values, Values] | None = None
    result: End | None = None

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike) -> Line:
        """A plain line."""
        return cls(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))

    @property
    def last(self) -> float | None:
        """What stands at its end: the result, or the last finite value."""
        if self.result is not None:
            return self.result[0]
        finite = self.y[np.isfinite(self.y)]
        return float(finite[-1]) if len(finite) else None


@dataclass(frozen=True, kw_only=True)
class Curves(Drawing):
    """Lines over time, each with its name and last value at its end.

    Args:
        lines: By name. The known positions have their own colours; more than eight lines shade from
            the first to the last.
        unit: What the values are.
        time: What is along the axis.
        result: What the results are, in a word; empty where there are none.
        limits: Ends of the axis of values; None: all that is drawn.
    """

    lines: Mapping[str, Line]
    unit: str
    time: str = "epoch"
    result: str = field(default="")
    limits: tuple[float, float] | None = None

    def height(self, narrow: bool) -> float:
        """Room for the legend of a phone, too."""
        return 290 + 18 * len(self._named()) if narrow else 340

    def _named(self) -> list[str]:
        """The lines whose names are shown, from the highest end."""
        ends = {name: line.last for name, line in self.lines.items()}
        known = {name: end for name, end in ends.items() if end is not None}
        names = [*known]
        if len(names) > _MOST:
            names = [names[0], names[-1]]
        return sorted(names, key=lambda name: -known[name])

    def paint(self, canvas: Canvas) -> None:
        """Paint bands, lines, results and names."""
        named = self._named()
        canvas.quiet(self.unit, "y", len(named) if canvas.narrow else 0)
        limits = self.limits or self._limits()
        colour = self._colours(canvas)
        for name, line in self.lines.items():
            _line(canvas, line, colour[name])
        self._time(canvas)
        if self.result:
            self._results(canvas, colour)
        canvas.axes.set_ylim(*limits)
        number_ticks(canvas.axes.yaxis, *limits)
        words = {name: f"{short(name, 24)}  {number(self.lines[name].last, 4)}" for name in named}
        (_legend if canvas.narrow else self._end_labels)(canvas, words, colour)

    def _colours(self, canvas: Canvas) -> dict[str, str]:
        if len(self.lines) <= _MOST:
            return canvas.colours([*self.lines])
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        # Neither the darkest nor the lightest: they must be seen on both papers.
        shades = colormaps["cividis"](np.linspace(0.3, 0.8, len(self.lines)))
        return {name: to_hex(shade) for name, shade in zip(self.lines, shades, strict=True)}

    def _limits(self) -> tuple[float, float]:
        every = [line.y for line in self.lines.values()]
        values = np.concatenate([*every, np.zeros(0)])
        finite = values[np.isfinite(values)]
        return margins(float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)

    @property
    def _ends(self) -> tuple[float, float]:
        """The first and the last time."""
        times = np.concatenate([line.x for line in self.lines.values()])
        return float(times.min()), float(times.max())

    @property
    def _beside(self) -> float:
        """Where the results stand."""
        first, last = self._ends
        return last + max(0.12 * (last - first), 0.5)

    def _time(self, canvas: Canvas) -> None:
        from matplotlib.ticker import FixedLocator, MaxNLocator

        axes = canvas.axes
        first, last = self._ends
        ticks = MaxNLocator(
            5 if canvas.narrow else 10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1
        ).tick_values(first, last)
        axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if first <= t <= last]))
        axes.set_xlabel(self.time, color=canvas.theme["muted"], fontsize=canvas.small)
        right = self._beside + 0.3 * (self._beside - last) if self.result else last
        room = 0.5 if first == last else 0.015 * (last - first)
        axes.set_xlim(first - (0.5 if first == last else 0), right + room)

    def _results(self, canvas: Canvas, colour: Mapping[str, str]) -> None:
        """A column of diamonds beside the lines, joined to the lines' ends by dots."""
        axes, theme = canvas.axes, canvas.theme
        (_, last), x = self._ends, self._beside
        axes.axvspan((last + x) / 2, axes.get_xlim()[1], color=theme["grid"], alpha=0.45, lw=0)
        canvas.below(x, -0.15, self.result)
        for name, line in self.lines.items():
            if line.result is None:
                continue
            value, low, high = line.result
            finite = np.flatnonzero(np.isfinite(line.y))[-1:]
            for at in map(int, finite):
                ends = ([float(line.x[at]), x], [float(line.y[at]), value])
                axes.plot(*ends, color=colour[name], lw=1.3, ls=(0, (1, 2)), zorder=2)
            if low is not None and high is not None:
                axes.plot([x, x], [low, high], color=colour[name], lw=1.6, zorder=3)
            axes.plot([x], [value], "D", ms=9, c=colour[name], mec=theme["paper"], zorder=4)

    def _end_labels(
        self, canvas: Canvas, words: Mapping[str, str], colour: Mapping[str, str]
    ) -> None:
        low, high = canvas.axes.get_ylim()
        order = [*words][::-1]
        line = (high - low) * 18 / 260  # of text; the axes are 260 pixels high or more
        places = _spread([self.lines[name].last or 0.0 for name in order], line, low, high)
        for name, place in zip(order, places, strict=True):
            canvas.write(
                words[name],
                (1, place),
                ("axes fraction", "data"),
                shift=(8, 0),
                colour=colour[name] if len(colour) <= _MOST else "ink",
            )


def _line(canvas: Canvas, line: Line, colour: str) -> None:
    axes, paper = canvas.axes, canvas.theme["paper"]
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=colour, alpha=0.18, lw=0)
    for values in line.behind:
        mark = "o" if len(values) == 1 else "none"
        axes.plot(line.x[: len(values)], values, marker=mark, ms=4, lw=0.9, alpha=0.35, c=colour)
    axes.plot(line.x, line.y, color=colour, lw=2.4, zorder=3)
    end = np.flatnonzero(np.isfinite(line.y))[-1:]
    axes.plot(line.x[end], line.y[end], "o", ms=8, c=colour, mec=paper, zorder=4)


def _legend(canvas: Canvas, words: Mapping[str, str], colour: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour[name], lw=2.4) for name in words]
    canvas.legend(handles, [*words.values()], 1)


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending values moved apart to at least ``gap``, each as little as the others allow.

    That is isotonic regression of ``value - i * gap``, by pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []
    for i, value in enumerate(values):
        mean, size = value - i * gap, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    top = high - (len(flat) - 1) * gap
    return [min(max(place, low), max(low, top)) + i * gap for i, place in enumerate(flat)]
