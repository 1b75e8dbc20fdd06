"""A row per layer (or run), with the values of each quantity before and after, or from and to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from truenorm._records.drawings.canvas import Canvas, margins, number_ticks
from truenorm._records.drawings.drawing import Drawing

_TINY = 1e-8  # a gap below it is rounding of float32, and drawn at zero

Marker = Literal["o", "D"]


@dataclass(frozen=True)
class Span:
    """One quantity: a value or two in each row. What is not a finite number is not drawn.

    Args:
        start: What the open mark means.
        end: What the filled mark means; empty where there is only an open one.
        starts: The values of the open marks.
        ends: Those of the filled marks.
        colour: The name of its colour.
        marker: A circle, or a diamond.
    """

    start: str
    end: str
    starts: Sequence[float | None]
    ends: Sequence[float | None]
    colour: str
    marker: Marker = "o"


@dataclass(frozen=True, kw_only=True)
class Rows(Drawing):
    """Dots in rows, those of one quantity joined.

    Args:
        names: The rows, from the top.
        unit: What is along the axis.
        spans: The quantities; several share a row, one below the other.
        log: A logarithmic axis with a place for zero, for values that are not negative.
    """

    names: Sequence[str]
    unit: str
    spans: Sequence[Span]
    log: bool = True

    def height(self, narrow: bool) -> float:
        """A line of text per row and quantity, closer together where there are many rows."""
        row = min(16 * len(self.spans) + 8, max(16, 1500 / max(1, len(self.names))))
        return row * len(self.names) + 90 + 18 * self._legend_lines(narrow)

    def _words(self) -> list[tuple[Span, str, bool]]:
        """Each kind of mark: its quantity, what it means, and whether it is filled."""
        return [
            (span, word, filled)
            for span in self.spans
            for word, filled in ((span.start, False), (span.end, True))
            if word
        ]

    def _legend_lines(self, narrow: bool) -> int:
        return math.ceil(len(self._words()) / (1 if narrow else 2))

    def paint(self, canvas: Canvas) -> None:
        """Paint rows, marks and their meaning."""
        axes, theme = canvas.axes, canvas.theme
        canvas.quiet(self.unit, "x", self._legend_lines(canvas.narrow))
        seen = [
            abs(v) if self.log else v
            for span in self.spans
            for v in (*span.starts, *span.ends)
            if v is not None and math.isfinite(v)
        ]
        if self.log:
            _logarithmic(canvas, seen)
            axes.axvline(0, color=theme["muted"], lw=1.2, zorder=1)
        else:
            ends = margins(min(seen, default=0.0), max(seen, default=1.0))
            axes.set_xlim(*ends)
            number_ticks(axes.xaxis, *ends)
        for index, span in enumerate(self.spans):
            shift = 0.36 * (index - (len(self.spans) - 1) / 2)
            self._span(canvas, span, shift)
        canvas.rows(self.names)
        self._legend(canvas)

    def _span(self, canvas: Canvas, span: Span, shift: float) -> None:
        axes, theme = canvas.axes, canvas.theme
        size = 7.5 if span.marker == "o" else 6.5
        for row, (was, now) in enumerate(zip(span.starts, span.ends, strict=True)):
            there = [
                abs(v) if self.log else v for v in (was, now) if v is not None and math.isfinite(v)
            ]
            axes.plot(there, [row + shift] * len(there), color=theme["faint"], lw=2, zorder=2)
        for values, filled in ((span.starts, False), (span.ends, True)):
            found = [
                (abs(v) if self.log else v, row + shift)
                for row, v in enumerate(values)
                if v is not None and math.isfinite(v)
            ]
            axes.plot(
                [x for x, _ in found],
                [y for _, y in found],
                span.marker,
                ms=size,
                mew=1.8 if not filled else 1,
                color=theme[span.colour],
                mfc=theme[span.colour if filled else "paper"],
                mec=theme["paper" if filled else span.colour],
                zorder=4 if filled else 3,
            )

    def _legend(self, canvas: Canvas) -> None:
        from matplotlib.lines import Line2D

        words = self._words()
        theme = canvas.theme
        handles = [
            Line2D(
                [],
                [],
                ls="none",
                marker=span.marker,
                ms=7,
                mew=1.8,
                mec=theme[span.colour],
                mfc=theme[span.colour if filled else "paper"],
            )
            for span, _, filled in words
        ]
        canvas.legend(handles, [word for _, word, _ in words], 1 if canvas.narrow else 2)


def _logarithmic(canvas: Canvas, values: Sequence[float]) -> None:
    """A logarithmic axis that has a place for zero."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    axes = canvas.axes
    large = [v for v in values if v >= _TINY]
    bottom = math.floor(math.log10(min(large, default=0.1)))
    top = max(math.ceil(math.log10(max(large, default=1.0))), bottom + 1)
    axes.set_xscale("symlog", linthresh=10.0**bottom, linscale=0.6)
    step = math.ceil((top - bottom + 1) / 5)
    lowest = bottom + canvas.narrow  # on a phone the last one would touch the zero
    ticks = [0.0, *(10.0**k for k in range(top, lowest - 1, -step))]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.set_xlim(-0.25 * 10.0**bottom, 10.0**top * 2)


def _power(value: float) -> str:
    """A power of ten in few characters: ``0.01``, ``10``, ``10⁻⁶``."""
    if value == 0 or 1e-3 <= value < 1e4:
        return f"{value:g}"
    return "10" + str(round(math.log10(value))).translate(
        str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    )
