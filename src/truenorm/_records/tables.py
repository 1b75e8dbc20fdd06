"""Records, and the tables of text that they print as: in the terminal, notebooks and reports.

All of them render :meth:`Record.tables`, so that a fact is worded in one place. Text that comes
from a model is made printable on its way out: a layer's name may hold any characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

from truenorm._records import json_text
from truenorm._records.json_text import NOT_DATA as NOT_DATA

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Table:
    """Rows of text under headings, with sentences below: all that a renderer needs.

    Args:
        title: What the table shows.
        columns: The headings; none if there are only sentences.
        rows: The cells, as many in each row as there are headings.
        notes: The sentences below.
        severities: ``error``, ``warning`` or ``note`` per row, where rows differ in that.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    severities: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from truenorm._records.terminal import drawn

        yield from drawn(self, options.max_width, beyond=bool(options.no_wrap))


class Record:
    """Base of all records: renders as text, HTML and JSON.

    ``print`` shows the tables as wide as the terminal is, or ``COLUMNS`` says, or 120 columns in a
    pipe or file; the interpreter shows one line; ``rich.print`` adds colours by severity.

    A copy, or a record that was pickled or written as JSON, has the facts. An ``undo`` stays with
    the record that the tool returned; a ``model`` goes along in a pickle, as Keras pickles models.
    """

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if "undo" in state:
            state["undo"] = json_text.no_undo
        return state

    def tables(self) -> Sequence[Table]:
        """The record as tables of text."""
        raise NotImplementedError

    def summary(self) -> str:
        """The record in a few words."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The record as plain dicts, lists, strings and numbers; non-finite numbers become None."""
        return cast(dict[str, Any], json_text.as_plain(self))

    def to_json(self) -> str:
        """The record as JSON text, with the name and version of its schema and truenorm's."""
        return json_text.write(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The record that :meth:`to_json` wrote; models and ``undo`` are not in JSON.

        Raises:
            DataError: The text is not JSON, of another kind of record, or of another version.
        """
        return json_text.read(cls, text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.tables()

    def __str__(self) -> str:
        from rich.console import Console

        from truenorm._records.terminal_width import terminal_width

        console = Console(width=terminal_width(), color_system=None, record=False)
        with console.capture() as capture:
            console.print(self, soft_wrap=True)  # no code is broken: it shall be copied
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip("\n")

    def __repr__(self) -> str:
        return printable(f"<{type(self).__name__} {self.summary()}>")

    def _repr_html_(self) -> str:
        from truenorm._records.html import as_html

        return "\n".join(as_html(table) for table in self.tables())


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


def counted(count: int, noun: str) -> str:
    """So many of something: "1 layer", "2 layers", "2 batches"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith(('ch', 's')) else 's'}"


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
