"""What the separate process does for ``load(…, isolate=True)``: it loads the file and reports."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path

import truenorm as tn
from truenorm._errors import TruenormError
from truenorm.archive import _isolation
from truenorm.archive._legacy import is_legacy

REPORT, CONVERTED = "report.json", "converted.keras"


@contextmanager
def checked(
    path: str, max_parameters: int, imports: Collection[str], memory: int
) -> Generator[str]:
    """See in a separate process that a file can be loaded; raise what is raised there.

    Gives the file to load here: that file, or what one of the old format was made into.
    """
    arguments = {"path": path, "max_parameters": max_parameters, "imports": list(imports)}
    entry = f"{__name__}:report"
    with _isolation.confined(entry, arguments, memory=memory, output=subprocess.DEVNULL) as ended:
        ended.check(path, memory)
        report = ended.folder / REPORT
        if not report.is_file():
            last = ended.complaints.strip().rsplit("\n", 1)[-1][:300]
            raise _isolation.too_much_memory(path, memory, last or None)
        told = json.loads(report.read_bytes())
        if told is not None:
            kind, message = told
            raise getattr(tn, kind)(message.removesuffix("."))
        yield str(ended.folder / CONVERTED) if is_legacy(path) else path


def report(folder: str, *, path: str, max_parameters: int, imports: Collection[str]) -> None:
    """In that process: load the file, and write what is wrong with it, or null."""
    from truenorm._keras_internals import leave_tensorflow_unloaded
    from truenorm.archive._loading import load_here, save

    leave_tensorflow_unloaded()
    told = None
    try:
        model = load_here(path, max_parameters=max_parameters, imports=imports)
        if is_legacy(path):
            save(model, Path(folder) / CONVERTED)
    except TruenormError as error:
        told = type(error).__name__, str(error)
    (Path(folder) / REPORT).write_text(json.dumps(told), "utf-8")
