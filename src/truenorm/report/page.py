"""Records and charts as one HTML file that needs nothing else.

A report holds no script and refers to nothing outside itself; its Content-Security-Policy says so
to the browser. Every text that comes from a model (a layer's name may be anything) is escaped, and
its control characters are made visible. Nothing here sees a model: only records are rendered.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truenorm._errors import MissingDependencyError
from truenorm._records.files import replacing
from truenorm._records.tables import Record, Table, printable
from truenorm.report.charts import Chart

_NUMBER = re.compile(r"[+−-]?(\d[\d.,]*(e[+-]?\d+)?%?|nan|inf)( \[.*\])?")


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        heading: Its heading, also in the line of contents.
        sentences: What it says, one paragraph each.
        content: What shows it: records (rendered as their tables), tables and charts.
    """

    heading: str
    sentences: tuple[str, ...] = ()
    content: tuple[Record | Table | Chart, ...] = ()


def report(title: str, lead: str | Sequence[str], sections: Sequence[Section]) -> str:
    """One self-contained HTML page.

    Args:
        title: The page's title.
        lead: The result in a sentence or a few: it stands in a box on the first screen.
        sections: The parts, in their order.

    Returns:
        The page as text; :func:`save` writes it. The same arguments give the same page.

    Raises:
        MissingDependencyError: Jinja2 is not installed.

    Example:
        >>> page = report("Study", "Nothing was shown.", [Section("Facts", ("There are none.",))])
        >>> "<script" in page
        False
    """
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise MissingDependencyError(
            "A report needs Jinja2, which is not installed",
            remedy='pip install "truenorm[report]"',
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        # Whatever the template shows passes here, so that no text is forgotten.
        finalize=lambda value: (
            printable(value)
            if isinstance(value, str) and not isinstance(value, markupsafe.Markup)
            else value
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html").render(
        title=title,
        lead=[lead] if isinstance(lead, str) else list(lead),
        sections=[
            {
                "heading": section.heading,
                "sentences": section.sentences,
                "content": [view for item in section.content for view in _views(item)],
            }
            for section in sections
        ],
    )


def save(path: str | os.PathLike[str], page: str) -> None:
    """Write a page so that the file is the old one or the new one, whole, whatever happens.

    Args:
        path: The file. A link is followed.
        page: The page, as :func:`report` gives it.

    Raises:
        OutputError: The file cannot be written; what was there is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def _breakable(text: str) -> Any:
    """A cell whose long names may be broken behind underscores and slashes, not within words."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=\w)[_/](?=\w)", r"\g<0><wbr>", str(escape(printable(text)))))  # noqa: S704


def _views(item: Record | Table | Chart) -> list[dict[str, Any]]:
    """What the template draws: one dict per table or chart."""
    if isinstance(item, Chart):
        return [
            {
                "kind": "chart",
                "title": item.title,
                "alt": item.alt,
                "svg": _data_url(item.svg),
                "narrow": _data_url(item.narrow) if item.narrow else "",
                "notes": item.notes,
            }
        ]
    tables = [item] if isinstance(item, Table) else item.tables()
    return [_table_view(table) for table in tables]


def _table_view(table: Table) -> dict[str, Any]:
    numeric = [_is_numeric([row[i] for row in table.rows]) for i in range(len(table.columns))]
    return {
        "kind": "table",
        "title": table.title,
        "columns": list(zip(table.columns, numeric, strict=True)),
        "rows": [
            [
                (*_split(cell), is_number) if is_number else (cell, "", False)
                for cell, is_number in zip(row, numeric, strict=True)
            ]
            for row in table.rows
        ],
        "notes": table.notes,
    }


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "–")]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)


def _split(cell: str) -> tuple[str, str]:
    """A number and its interval, which the page sets smaller."""
    value, mark, rest = cell.partition(" [")
    return value, mark + rest


def _data_url(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
