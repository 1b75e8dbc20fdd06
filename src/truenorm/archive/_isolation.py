"""Opening a file in a separate process with limits, so that this one survives whatever it does.

What the limits are, and what they do not hold, is written in :mod:`truenorm.archive._confinement`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from truenorm._errors import ArchiveError
from truenorm._records.files import temporary_folder
from truenorm.archive import _copy
from truenorm.archive._limits import GIB, SECONDS

MOST_COMPLAINTS = 2**20

_CONFINEMENT = Path(__file__).with_name("_confinement.py")


@dataclass(frozen=True)
class Ended:
    """How a separate process ended.

    Args:
        folder: Where it could write; it is removed afterwards.
        code: Its exit code; below 0 the signal that ended it.
        complaints: The beginning of what it wrote to standard error.
    """

    folder: Path
    code: int
    complaints: str

    def check(self, path: str, memory: int) -> None:
        """Raise if a signal ended it."""
        if self.code >= 0:
            return
        if self.code == -getattr(signal, "SIGALRM", 0):
            raise ArchiveError(
                "The file takes too long to load, and was given up",
                where=path,
                expected=f"{SECONDS:g} seconds at most",
                remedy="if you trust the file, load it without limits: isolate=False "
                "(--no-isolate)",
            )
        raise too_much_memory(path, memory, f"the process was ended by {_name(-self.code)}")


def too_much_memory(path: str, memory: int, received: str | None = None) -> ArchiveError:
    """The error of a file that took more than was allowed, or that ended its process."""
    return ArchiveError(
        "The file could not be opened within its limits",
        where=path,
        expected=f"{memory / GIB:.3g} GiB of memory at most",
        received=received,
        remedy="if you trust the file, allow more: max_memory (--max-memory), or isolate=False "
        "(--no-isolate)",
    )


def not_enough_memory(path: str, received: str) -> ArchiveError:
    """The error of a file for which a framework could not get memory."""
    return ArchiveError(
        "There is not enough memory to load this file",
        where=path,
        received=received or None,
        remedy="do not load it anywhere unless you trust it; to an isolated process more can be "
        "allowed: max_memory (--max-memory)",
    )


@contextmanager
def confined(
    entry: str,
    arguments: Mapping[str, Any],
    *,
    memory: int,
    output: int | None = None,
    hear: Callable[[str], bool] | None = None,
    copied: bool = False,
) -> Generator[Ended]:
    """Call ``module:function`` in a separate process with limits, and wait for its end.

    Args:
        entry: The function; it is given the path of the folder that it may write to.
        arguments: Its keywords, as JSON can say them.
        memory: Bytes of private memory that the process may take.
        output: Where its standard output goes; None for this process's.
        hear: Gets each line of its standard error at once; whether it is done with by that.
        copied: Whether it may be a copy of this process, which has not been started anew: for a
            process that has loaded little.
    """
    with temporary_folder() as folder:
        job = {"folder": str(folder), "memory": memory, "seconds": SECONDS, "entry": entry,
               "arguments": arguments, "path": sys.path}  # fmt: skip
        environment = {"TMPDIR": str(folder), "JOBLIB_MULTIPROCESSING": "0"}
        if copied and output is None and _copy.is_safe():
            process = _copy.Copy(job, environment)
        else:
            process = subprocess.Popen(  # noqa: S603 (this Python, and a file of ours)
                [sys.executable, "-P", str(_CONFINEMENT), json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE,
                env={**os.environ, **environment},
            )
        try:
            complaints = _beginning(process.stderr, hear)
            process.wait()
        finally:
            process.kill()
            code = process.wait()
        yield Ended(folder, code, complaints)


def _beginning(stream: IO[bytes] | None, hear: Callable[[str], bool] | None) -> str:
    """What is written to a pipe until it is closed, as far as it is kept and not heard."""
    if stream is None:
        return ""
    kept = bytearray()
    with stream:
        while line := stream.readline(MOST_COMPLAINTS):
            if hear is None or not hear(line.decode(errors="replace")):
                kept += line[: MOST_COMPLAINTS - len(kept)]
    return kept.decode(errors="replace")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
