"""What the separate process does for ``load(…, isolate=True)``: it loads the file and reports."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection
from pathlib import Path

import truenorm as tn
from truenorm._errors import TruenormError
from truenorm.archive import _isolation

REPORT = "report.json"


def check(path: str, *, max_parameters: int, imports: Collection[str], memory: int) -> None:
    """See in a separate process that a file can be loaded; raise what is raised there."""
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


def report(folder: str, *, path: str, max_parameters: int, imports: Collection[str]) -> None:
    """In that process: load the file, and write what is wrong with it, or null."""
    from truenorm.archive._loading import load

    told = None
    try:
        load(path, max_parameters=max_parameters, imports=imports)
    except TruenormError as error:
        told = type(error).__name__, str(error)
    (Path(folder) / REPORT).write_text(json.dumps(told), "utf-8")
