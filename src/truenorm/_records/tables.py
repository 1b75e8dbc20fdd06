"""Records, and the tables of text that they print as: in the terminal, notebooks and reports.

All of them render :meth:`Record.tables`, so that a fact is worded in one place. Text that comes
from a model is made printable here: a layer's name may hold any characters.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from truenorm._errors import ModelError
from truenorm._records.moments import Moments

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

NOT_DATA = {"data": False}
"""Metadata of a field that holds a live object (a model, an undo): it is left out of JSON."""


@dataclass(frozen=True)
class Table:
    """Rows of text under headings, with sentences below: all that a renderer needs."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table as RichTable
        from rich.text import Text

        title = Text(printable(self.title), style="bold")
        if self.columns:
            drawn = RichTable(title=title, title_justify="left")
            for column in self.columns:
                drawn.add_column(Text(column), overflow="fold")
            for row in self.rows:
                drawn.add_row(*(Text(printable(cell)) for cell in row))
            yield drawn
        else:
            yield title
        for note in self.notes:
            yield Text(printable(note))


class Record:
    """Base of all records: renders as text, HTML and JSON.

    A copy, or a record that was pickled, has the facts. An ``undo`` stays with the record that the
    tool returned; a ``model`` goes along, as Keras pickles models.
    """

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if "undo" in state:
            state["undo"] = _no_undo
        return state

    def tables(self) -> Sequence[Table]:
        """The record as tables of text."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The record as plain dicts, lists, strings and numbers; non-finite numbers become None."""
        return cast(dict[str, Any], _plain(self))

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.tables()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None, record=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def _repr_html_(self) -> str:
        return "\n".join(_html(table) for table in self.tables())


def _no_undo() -> None:
    raise ModelError(
        "This record is a copy, which cannot undo anything",
        expected="the record that the tool returned, in the process where it ran",
        remedy="call undo() of that one",
    )


def printable(text: str) -> str:
    """The text with control characters (escape sequences, newlines) made visible, not obeyed."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table cell: ``digits`` significant digits, a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}"


def percent(value: float, digits: int = 2) -> str:
    """A share for a table cell, in per cent."""
    return f"{100 * value:.{digits}f}%"


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(printable(c))}</td>" for c in row) + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<p>{html.escape(printable(n))}</p>" for n in table.notes)
    title = html.escape(printable(table.title))
    return f"<table><caption>{title}</caption><tr>{head}</tr>{body}</table>{notes}"


def _plain(value: Any) -> Any:
    if isinstance(value, Moments):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in fields(value)
            if f.metadata.get("data", True)
        }
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in cast(Sequence[Any], value)]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def grouped(rows: Iterable[tuple[str, tuple[str, ...]]]) -> tuple[tuple[str, ...], ...]:
    """Sites with the same cells, on one line."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for path, row in rows:
        alike.setdefault(row, []).append(path)
    return tuple((joined(paths), *row) for row, paths in alike.items())


def joined(paths: Sequence[str], most: int = 3) -> str:
    """Sites that did the same, on one line."""
    if len(paths) <= most:
        return ", ".join(paths)
    return f"{len(paths)} sites: {', '.join(paths[: most - 1])}, … {paths[-1]}"
