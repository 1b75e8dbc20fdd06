"""The files that commands write, refused before anything is loaded if they could not be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from truenorm._errors import OutputError

Out = Annotated[
    Path,
    typer.Option(
        help="The .keras file to write; with --force it may be the input file.", show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if there is one already.")]


def check_free(path: Path, *, force: bool, ending: str) -> None:
    """Refuse a file that cannot be written, or that there is already unless it may be replaced."""
    folder = path.resolve().parent
    if path.suffix != ending:
        problem, expected = (
            "This file is not called as it should be",
            f"a name that ends in {ending}",
        )
    elif not folder.is_dir() or not os.access(folder, os.W_OK):
        problem, expected = "The file cannot be written", "a folder that exists and may be written"
    elif path.exists() and not path.is_file():
        problem, expected = "The file cannot be written", "a file: this is a folder or a device"
    elif path.exists() and not force:
        raise OutputError(
            "There is such a file already", where=str(path), remedy="add --force to replace it"
        )
    else:
        return
    raise OutputError(problem, where=str(path), expected=expected, remedy="give another path")
