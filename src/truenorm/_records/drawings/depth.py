"""Drawings along the depth of a model: a column for each of its places, in their order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from textwrap import fill
from typing import Any

from truenorm._records.drawings.canvas import Canvas
from truenorm._records.drawings.drawing import Drawing

_AT_LEFT = ("axes fraction", "data")


@dataclass(frozen=True)
class Kind:
    """What a cell of a strip shows.

    Args:
        words: What it means.
        colour: The name of its colour.
        strength: How strong the colour is, up to 1.
    """

    words: str
    colour: str
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Strips(Drawing):
    """Strips of a model, one below the other, each place coloured by what it is there.

    Args:
        places: The columns.
        strips: Per name of a strip, the kind of each place.
    """

    places: Sequence[str]
    strips: Mapping[str, Sequence[Kind]]

    def _kinds(self) -> list[Kind]:
        return [*dict.fromkeys(kind for row in self.strips.values() for kind in row)]

    def height(self, narrow: bool) -> float:
        """A line of text per strip, the names below, and the legend above."""
        lines = math.ceil(len(self._kinds()) / _columns(narrow))
        return 30 * len(self.strips) + _below(self.places) + 18 * lines

    def paint(self, canvas: Canvas) -> None:
        """Paint the strips, a fine line between their places, and the legend."""
        from matplotlib.patches import Patch

        axes, theme = canvas.axes, canvas.theme
        kinds, columns = self._kinds(), _columns(canvas.narrow)
        canvas.quiet("", "x", math.ceil(len(kinds) / columns))
        axes.grid(visible=False)
        for row, strip in enumerate(self.strips.values()):
            for kind, start, length in _runs(strip):
                axes.broken_barh(
                    [(start - 0.5, length)],
                    (row - 0.4, 0.8),
                    color=theme[kind.colour],
                    alpha=kind.strength,
                    lw=0,
                )
        if len(self.places) < 80:
            borders = [i + 0.5 for i in range(len(self.places) - 1)]
            axes.vlines(borders, -0.5, len(self.strips) - 0.5, color=theme["paper"], lw=1.5)
        axes.spines["bottom"].set_visible(False)
        axes.set_ylim(len(self.strips) - 0.45, -0.55)
        axes.set_yticks(range(len(self.strips)), [*self.strips], color=theme["ink"])
        canvas.depth(self.places)
        patches = [Patch(color=theme[k.colour], alpha=k.strength, lw=0) for k in kinds]
        canvas.legend(patches, [k.words for k in kinds], columns)


def _runs(strip: Sequence[Kind]) -> Iterator[tuple[Kind, int, int]]:
    """Neighbours of one kind together: kind, first column, number of columns."""
    start = 0
    for kind, group in groupby(strip):
        length = len([*group])
        yield kind, start, length
        start += length


@dataclass(frozen=True)
class Mark:
    """Something at one place.

    Args:
        row: The name of its row.
        place: Where; what is no place of the model is about all of it.
        kind: One of the kinds of the drawing.
    """

    row: str
    place: str
    kind: str


MARKERS: Mapping[str, tuple[str, str]] = {
    "error": ("X", "crimson"),
    "warning": ("^", "orange"),
    "note": ("o", "blue"),
}
"""Marker and colour of each severity."""


@dataclass(frozen=True, kw_only=True)
class Marks(Drawing):
    """Marks along the depth of a model, a row for each of their names.

    Args:
        places: The columns.
        rows: What the rows are, by name: words that stand above them.
        marks: The marks.
    """

    places: Sequence[str]
    rows: Mapping[str, str]
    marks: Sequence[Mark]

    def height(self, narrow: bool) -> float:
        """A row's words and its line, the names below, and the legend above."""
        lines = len(self._kinds()) if narrow else 1
        most = max((words.count("\n") for words in self._words(narrow).values()), default=0)
        return (46 + 16 * most) * len(self.rows) + _below(self.places) + 18 * lines

    def _words(self, narrow: bool) -> dict[str, str]:
        """What stands above each row, in lines that fit."""
        most = 44 if narrow else 110
        return {name: fill(f"{name}  {words}", most) for name, words in self.rows.items()}

    def _kinds(self) -> list[str]:
        seen = {mark.kind for mark in self.marks}
        return [kind for kind in MARKERS if kind in seen]

    def paint(self, canvas: Canvas) -> None:
        """Paint a line per row and its marks; one about the whole model is a line along it."""
        axes, theme = canvas.axes, canvas.theme
        kinds = self._kinds()
        canvas.quiet("", "x", len(kinds) if canvas.narrow else 1)
        axes.spines["bottom"].set_visible(False)
        columns = {place: x for x, place in enumerate(self.places)}
        rows = {name: y for y, name in enumerate(self.rows)}
        for name, words in self._words(canvas.narrow).items():
            axes.axhline(rows[name], color=theme["faint"], lw=1, zorder=1)
            lines = words.split("\n")
            for index, line in enumerate(reversed(lines)):
                shift = (0, 15 + 1.25 * canvas.small * index)
                canvas.write(line, (0, rows[name]), _AT_LEFT, shift=shift, inside=True, covers=True)
        for mark in self.marks:
            marker, colour = MARKERS[mark.kind]
            found = [x for place, x in columns.items() if place == mark.place]
            look: dict[str, Any] = {"color": theme[colour], "mec": theme["paper"], "zorder": 3}
            xs = found or [*columns.values()]
            ends = [xs[0], xs[-1]] if xs else [0, 0]
            if not found:
                axes.plot(ends, [rows[mark.row]] * 2, color=theme[colour], lw=4, zorder=2)
            axes.plot(ends, [rows[mark.row]] * 2, marker, ms=10, **look)
        axes.set_ylim(len(self.rows) - 0.5, -0.8)
        axes.set_yticks([])
        canvas.depth(self.places)
        self._legend(canvas, kinds)

    def _legend(self, canvas: Canvas, kinds: Sequence[str]) -> None:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], ls="none", marker=MARKERS[k][0], ms=9, c=canvas.theme[MARKERS[k][1]])
            for k in kinds
        ]
        canvas.legend(handles, kinds, 1 if canvas.narrow else max(1, len(kinds)))


def _columns(narrow: bool) -> int:
    return 1 if narrow else 4


def _below(places: Sequence[str]) -> float:
    """Room for the names of places, which are turned, and for the title."""
    return 60 + 7.5 * min(24, max(map(len, places), default=1))
