"""One driver at a time in a study's folder."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from truenorm._errors import StudyError

LOCK = ".lock"
_BEYOND = 2**20
"""Where Windows locks a byte: what is locked cannot be read, and the file's text is to be read."""


@contextmanager
def only_driver(folder: Path) -> Generator[None]:
    """Hold the folder; the operating system lets it go when this process ends, however it ends.

    Raises:
        StudyError: Another process holds it.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
        except OSError:
            file.seek(0)
            raise StudyError(
                "Another process is running a study in this folder",
                where=str(folder),
                received=f"process {file.read().strip() or 'unknown'}",
                remedy="wait until it has ended: its finished trials are kept, and both would "
                "write the same files",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, which locks bytes from the file's position on
        import msvcrt

        os.lseek(descriptor, _BEYOND, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
