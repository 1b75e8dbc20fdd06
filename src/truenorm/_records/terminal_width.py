"""How wide the terminal is; apart from what draws on it, which imports rich."""

from __future__ import annotations

import shutil

DEFAULT_WIDTH = 120
"""Columns of a pipe or a file, unless the variable COLUMNS says how many."""

NARROW = 100
"""Below so many columns a table has its cells on one line each, or is stacked."""


def terminal_width() -> int:
    """The variable COLUMNS, else the terminal's width, else the default."""
    return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
