"""Atomic writes: there is always the old file or the new one, never a half-written one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path

from truenorm._errors import OutputError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path]:
    """A temporary path that becomes ``path`` when the block ends without an exception.

    It is in the same folder and has the same suffix; a link is followed. Even if the process is
    killed, ``path`` is the old file or the whole new one.

    Raises:
        OutputError: The file cannot be written; what was there is unchanged.
    """
    try:
        target = Path(path).resolve()
        temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}.tmp{target.suffix}")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round in a circle
        raise _unwritable(path, error) from error
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it became the target, or could never be made
            temporary.unlink()


def _unwritable(path: str | os.PathLike[str], error: Exception) -> OutputError:
    return OutputError(
        "The file cannot be written",
        where=str(path),
        expected="a file name in a folder that exists and can be written to",
        received=getattr(error, "strerror", None) or str(error),
        remedy="choose another path; what was there is unchanged",
    )
