"""``inspect FILE --static``: a file is read in a separate process.

Importing Typer takes longer than reading the file, so a command line without further options is
recognised here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from truenorm._cli import apart
from truenorm._cli.refusing import refusing, within
from truenorm.archive import _isolation
from truenorm.archive._limits import memory_for


def plain(arguments: Sequence[str]) -> str | None:
    """The file of a static reading without further options; None for any other command line."""
    files = [one for one in arguments[1:] if not one.startswith("-")]
    options = {one for one in arguments[1:] if one.startswith("-")}
    is_plain = "--static" in options and options <= {"--static", "--json"}
    return files[0] if is_plain and arguments[0] == "inspect" and len(files) == 1 else None


def read_apart(file: str, *, as_json: bool, max_memory: int | None = None) -> int:
    """Show what a file says of itself, read in a separate process; gives the exit code."""
    memory = max_memory or memory_for([file])
    arguments = {"file": file, "as_json": as_json, "memory": memory}
    with _isolation.confined(f"{__name__}:enter", arguments, memory=memory, copied=True) as ended:
        ended.check(file, memory)
        sys.stderr.write(ended.complaints)
    return ended.code


def enter(folder: str, *, file: str, as_json: bool, memory: int) -> None:
    """In the separate process."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # or NumPy starts threads that find nothing to do
    from truenorm._cli.output import show
    from truenorm.archive import read

    apart.begin(folder)
    with within(file, memory), refusing():
        show(read(file), as_json=as_json)
