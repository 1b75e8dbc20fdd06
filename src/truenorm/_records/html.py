"""Tables in a notebook: text on the left, numbers on the right, in the colours of its theme.

Notebooks align all cells on the right and drop style sheets that come with an output, so each cell
says how it is aligned. No colour is set but that of a severity, as a bar beside its row: what is
readable on white and on black is the theme's business. Where a column of the page is narrow, prose
is wrapped and the table scrolls, so that no word is cut.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from truenorm._records.tables import printable

if TYPE_CHECKING:
    from truenorm._records.tables import Table

_NUMBER = re.compile(r"[+−-]?(\d[\d.,]*(e[+-]?\d+)?%?|nan|inf)( \[.*\])?")
_PROSE = 25
"""A cell with more characters is wrapped, but gets some width before the table scrolls."""

_CELL = "vertical-align:top;padding:0.2em 0.6em"
_LEFT, _RIGHT = f"text-align:left;{_CELL}", f"text-align:right;{_CELL}"
_SHORT, _LONG = "white-space:nowrap", "white-space:normal;min-width:16em"
_TITLE, _NOTE = "margin:0.6em 0 0.2em;font-weight:bold", "margin:0.2em 0"
_BARS = {"error": "#d33", "warning": "#c80", "note": "#39c"}


def as_html(table: Table) -> str:
    """The table as HTML, its texts escaped."""
    columns = [[row[index] for row in table.rows] for index in range(len(table.columns))]
    aligned = [_RIGHT if _is_numeric(column) else _LEFT for column in columns]
    head = "".join(
        f'<th style="{side};white-space:normal">{_shown(name)}</th>'
        for name, side in zip(table.columns, aligned, strict=True)
    )
    styles = [
        f"{side};{_LONG if any(len(cell) > _PROSE for cell in column) else _SHORT}"
        for side, column in zip(aligned, columns, strict=True)
    ]
    bars = [_bar(severity) for severity in table.severities] or [""] * len(table.rows)
    body = "".join(_row(row, styles, bar) for row, bar in zip(table.rows, bars, strict=True))
    notes = "".join(f'<p style="{_NOTE}">{_shown(note)}</p>' for note in table.notes)
    cells = (
        f'<div style="overflow-x:auto"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return f'<p style="{_TITLE}">{_shown(table.title)}</p>{cells if head else ""}{notes}'


def _row(row: Sequence[str], styles: Sequence[str], bar: str) -> str:
    cells = [
        f'<td style="{style}{bar if not index else ""}">{_shown(cell)}</td>'
        for index, (cell, style) in enumerate(zip(row, styles, strict=True))
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _bar(severity: str) -> str:
    return f";border-left:4px solid {_BARS[severity]}" if severity in _BARS else ""


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "–")]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)


def _shown(text: str) -> str:
    return html.escape(printable(text))
