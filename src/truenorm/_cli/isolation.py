"""``--isolate``: a command runs again, in a separate process with limits, and hands over its file.

All of it runs there, not only the loading: a model can ask for memory when it is run, too. This
process only waits, puts the file that was made in its place, and says in one line what went wrong.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from truenorm._cli import apart
from truenorm._cli.apart import MADE, is_apart
from truenorm._cli.files import Force, check_free
from truenorm._cli.refusing import within
from truenorm._cli.static import read_apart
from truenorm._model import progress
from truenorm._records.files import replacing
from truenorm._records.tables import printable

Isolate = Annotated[
    bool,
    typer.Option(
        "--isolate/--no-isolate",
        help="Open the file in a separate process with limits: memory, files, no network.",
    ),
]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        min=0.5,
        metavar="GIB",
        help="Memory that the isolated process may take; by default 3 and more by the files' size.",
        show_default=False,
    ),
]


def isolated(command: Callable[..., None]) -> Callable[..., None]:
    """The command with ``--isolate``, ``--max-memory`` and, where it writes a file, ``--force``."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(
        *, isolate: bool, max_memory: float | None, force: bool = False, **options: Any
    ) -> None:
        if "out" in options and not is_apart():
            check_free(options["out"], force=force, ending=".keras")
        if isolate and not is_apart():
            raise typer.Exit(_run_apart(options, max_memory))
        command(**options)

    own = {"isolate": (Isolate, True), "max_memory": (MaxMemory, None)}
    if "out" in signature.parameters:
        own = {"force": (Force, False), **own}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in own.items()
    ]
    keywords = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in signature.parameters.values()
    ]
    run.__signature__ = signature.replace(parameters=[*keywords, *added])  # pyright: ignore[reportAttributeAccessIssue]
    return run


def enter(
    folder: str, *, arguments: list[str], file: str, memory: int, progress_shown: bool
) -> None:
    """In the separate process: run the command."""
    from truenorm._cli.app import run

    apart.begin(folder)
    sys.argv = ["truenorm", *arguments]
    if progress_shown:
        progress.tell_another_process()
    with within(file, memory):
        run()


def _run_apart(options: Mapping[str, Any], max_memory: float | None) -> int:
    """Run the command of this process in a separate one; gives its exit code."""
    from truenorm.archive import _isolation
    from truenorm.archive._limits import GIB, memory_for

    file = str(options["file"])
    given = None if max_memory is None else int(max_memory * GIB)
    if options.get("static"):
        return read_apart(file, as_json=options["as_json"], max_memory=given)
    memory = given or memory_for([file, options.get("data")])
    shows = progress.is_shown(None)
    arguments = {"arguments": sys.argv[1:], "file": file, "memory": memory, "progress_shown": shows}
    line = progress.Line("truenorm")
    with _isolation.confined(
        f"{__name__}:enter", arguments, memory=memory, hear=line.relay if shows else None
    ) as ended:
        line.wipe()
        ended.check(file, memory)
        sys.stderr.write(ended.complaints)
        made = ended.folder / MADE
        if ended.code == 0 and made.is_file():
            _put_in_place(made, options["out"])
            if not options["as_json"]:
                print(f"Saved as {printable(str(options['out']))}")
    return ended.code


def _put_in_place(made: Path, out: Path) -> None:
    with replacing(out) as temporary:
        shutil.copyfile(made, temporary)
