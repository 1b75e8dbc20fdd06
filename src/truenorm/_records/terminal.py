"""Tables on a terminal: columns where they fit, stacked lines where they do not.

No word is split, unless it alone is longer than the line, and no code that a note holds, so that it
can be copied. Lines and widths are made here, since rich narrows columns without regard to the
words in them, and fills lines up with blanks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from truenorm._records.tables import printable
from truenorm._records.terminal_width import NARROW

if TYPE_CHECKING:
    from rich.console import RenderableType

    from truenorm._records.tables import Table

CALL = re.compile(r"(?<![\w.])(?:\w+ = )?(?:\w+\.)+\w+\(")  # from where a word begins
_WORD = r"(?:'[^']*'|[^\s;:,]+)"
COMMAND = re.compile(
    rf"truenorm \w+ {_WORD}(?: (?:\w+_(?:activation|layer)|none|POSITION)\b)?"
    rf"(?: --[\w-]+(?: (?!--){_WORD})?)*"
)
"""Code in a note: where a call of Python begins, and a command."""

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def drawn(table: Table, width: int, *, beyond: bool) -> Iterator[RenderableType]:
    """The table for a terminal of this width; code may go beyond it if that is not cut off."""
    columns = [printable(column) for column in table.columns]
    rows = [[printable(cell) for cell in row] for row in table.rows]
    colours = [_COLOURS.get(severity, "") for severity in table.severities] or [""] * len(rows)
    yield from (Text(line, style="bold") for line in lines(printable(table.title), width))
    widths = _widths(columns, rows, width)
    if widths is not None:
        yield _in_columns(columns, rows, colours, widths)
    else:
        named = _name_width(columns[1:], rows, width)
        for (first, *others), colour in zip(rows, colours, strict=True):
            yield from (Text(line, style=f"bold {colour}") for line in lines(first, width))
            yield from _stacked(columns[1:], others, named, width)
    for note in table.notes:
        for line in lines(printable(note), width, beyond=beyond):
            yield Text(line, no_wrap=beyond, overflow="ignore" if beyond else "fold")


def lines(text: str, width: int, *, beyond: bool = False) -> list[str]:
    """The words of a text in lines of this width; longer is only code, if it may go ``beyond``."""
    made = [""]
    for word in _words(text):
        if made[-1] and cell_len(f"{made[-1]} {word}") <= width:
            made[-1] += f" {word}"
            continue
        parts = [word]
        if cell_len(word) > width and not (beyond and " " in word):
            parts = [one.plain for one in Text(word).wrap(Console(), width, overflow="fold")]
        made += parts
    return made[1:] if made[1:] and not made[0] else made


def _words(text: str) -> Iterator[str]:
    """The words of a text; a piece of code is one word, with what follows it without a blank."""
    end = 0
    for start, stop in code_in(text):
        if start >= end:
            yield from text[end:start].split()
            blank = re.search(r"\s|$", text[stop:])
            end = stop + (blank.start() if blank else 0)
            yield text[start:end]
    yield from text[end:].split()


def code_in(text: str) -> Iterator[tuple[int, int]]:
    """Where each piece of code in a text begins and ends."""
    end = 0
    for found in sorted([*CALL.finditer(text), *COMMAND.finditer(text)], key=lambda m: m.start()):
        if found.start() < end:  # inside the one before
            continue
        end, depth = found.end(), found.re is CALL
        while depth and end < len(text):
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        yield found.start(), end


def _in_columns(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    colours: Sequence[str],
    widths: Sequence[int],
) -> RenderableType:
    grid = Grid()
    for column, wide in zip(columns, widths, strict=True):
        grid.add_column(Text(column), width=wide, overflow="fold")
    for (first, *others), colour in zip(rows, colours, strict=True):
        grid.add_row(Text(first, style=colour), *map(Text, others))
    return grid if columns else Text("", end="")


def _name_width(names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """How wide the names are of stacked cells: on one line each, if the cells leave room."""
    longest = max(map(cell_len, names), default=0)
    cell = max((cell_len(cell) for row in rows for cell in row[1:]), default=0)
    return min(longest, max(_longest_word(names), width // 3, width - cell - 4))


def _stacked(
    names: Sequence[str], cells: Sequence[str], named: int, width: int
) -> Iterator[RenderableType]:
    """The cells of a row under each other, behind their names."""
    for heading, cell in zip(names, cells, strict=True):
        left, right = lines(heading, named), lines(cell, max(width - named - 4, 1))
        for name, line in zip_longest(left, right, fillvalue=""):
            label = f"  {name}{' ' * (named - cell_len(name))}  " if line else f"  {name}"
            yield Text.assemble((label, "dim"), line)


def _widths(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> Sequence[int] | None:
    """How wide each column of cells is; None where they do not fit."""
    room = width - 3 * len(columns) - 1  # a line and two blanks around each
    cells = [[row[index] for row in rows] for index in range(len(columns))]
    bodies = [max(map(cell_len, column), default=0) for column in cells]
    wanted = [max(cell_len(name), body) for name, body in zip(columns, bodies, strict=True)]
    if width < NARROW:  # only headings are wrapped
        least = [
            max(_longest_word([name]), body) for name, body in zip(columns, bodies, strict=True)
        ]
    else:
        least = [
            _longest_word([name, *column]) for name, column in zip(columns, cells, strict=True)
        ]
    return _shared_out(wanted, least, room) if sum(least) <= room else None


def _shared_out(wanted: Sequence[int], least: Sequence[int], room: int) -> Sequence[int]:
    """The widths wanted, the widest made narrower until there is room, none below its least."""
    most = max(wanted, default=0)
    widths = list(wanted)
    while sum(widths) > room:
        most -= 1
        widths = [max(low, min(one, most)) for one, low in zip(wanted, least, strict=True)]
    left = room - sum(widths)
    for index, one in enumerate(wanted):  # what the last step took too much
        if left and widths[index] == most < one:
            widths[index] += 1
            left -= 1
    return widths


def _longest_word(texts: Sequence[str]) -> int:
    return max((cell_len(word) for text in texts for word in text.split()), default=0)
