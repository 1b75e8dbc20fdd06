"""Atomic writes: there is always the old file or the new one, never a half-written one."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import platform
import re
import secrets
import shutil
import stat
import struct
import sys
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Generator
from functools import cache
from pathlib import Path

from truenorm._errors import OutputError

UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,  # sizes, and Python's parser on an array's header that is nested too deep
    OSError,
    RuntimeError,  # h5py's, an encrypted member, a compression that Python does not know, recursion
    SyntaxError,  # an array's header
    TypeError,  # HDF5 types that NumPy does not have
    ValueError,  # JSON and Unicode included
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile, NumPy, h5py and json raise on a file that is damaged or made up."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path]:
    """A temporary path that becomes ``path`` when the block ends without an exception.

    It is in the same folder and has the same ending. Whatever happens, a kill or a power cut at any
    moment included, ``path`` is what it was or what was written, whole.

    A file that is replaced keeps its mode and, where the system allows it, its owner; a new one
    gets what the umask says. A symbolic link is followed. Of a hard link only this name gets the
    new file. What is no file (a pipe, a device, a folder) is refused. Temporary files of processes
    that were killed are removed by the next one that writes the same path.

    Raises:
        OutputError: The file cannot be written; what was there is unchanged.
    """
    try:
        target = Path(path).resolve()
        before = _regular(target)
        temporary = target.with_name(f".{target.stem}.{owned_name()}.tmp{target.suffix}")
        remove_abandoned(target.parent, f".{target.stem}.", f".tmp{target.suffix}")
        if before is not None:  # not even for a moment can others read what they could not before
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL in the name
        raise _unwritable(path, error) from error
    try:
        yield temporary
        if before is not None:
            _dress(temporary, before)
        _sync(temporary, os.O_RDWR)
        temporary.replace(target)
        with contextlib.suppress(OSError):  # not every file system does that
            _sync(target.parent, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it became the target, or could never be made
            temporary.unlink()


@contextlib.contextmanager
def temporary_folder() -> Generator[Path]:
    """A folder that is removed at the end; what killed processes left of them goes first."""
    place = Path(tempfile.gettempdir())
    remove_abandoned(place, "truenorm-")
    folder = place / f"truenorm-{owned_name()}"
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def owned_name() -> str:
    """A name for something temporary by which its process can be found: machine, process, number.

    Processes are numbered for each machine and, in containers, for each namespace.
    """
    return f"{_machine()}-{os.getpid()}-{secrets.token_hex(6)}"


def remove_abandoned(folder: Path, before: str, after: str = "") -> None:
    """Delete what processes of this machine left that do not live any more.

    It is what is called ``before``, :func:`owned_name`, ``after``.
    """
    _remove_abandoned(folder, re.escape(before), re.escape(after))


def remove_temporaries(folder: Path) -> None:
    """Delete what :func:`replacing` left in a folder when it was killed, whatever was written.

    Files of writers that live stay, and so do those of other machines.
    """
    _remove_abandoned(folder, r"\..*\.", r"\.tmp.*")


def _remove_abandoned(folder: Path, before: str, after: str) -> None:
    pattern = re.compile(f"{before}{_machine()}-([0-9]+)-[0-9a-f]{{12}}{after}", re.DOTALL)
    with contextlib.suppress(OSError):
        for one in folder.iterdir():
            found = pattern.fullmatch(one.name)
            if found and not _lives(int(found[1])):
                shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()


@cache
def _machine() -> str:
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _lives(process: int) -> bool:
    if sys.platform == "win32":  # it has no way to ask that ends nothing
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        pass
    return True


def _regular(target: Path) -> os.stat_result | None:
    """What is known of the file that will be replaced; None if there is none yet."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no file, but a folder, a pipe or a device")
    return found


def _dress(temporary: Path, before: os.stat_result) -> None:
    """Give the new file the owner and the mode of the old one."""
    with contextlib.suppress(OSError, AttributeError):  # Windows has no owners of this kind
        os.chown(temporary, before.st_uid, before.st_gid)
    temporary.chmod(stat.S_IMODE(before.st_mode) & 0o777)


def _sync(path: Path, how: int) -> None:
    file = os.open(path, how)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _unwritable(path: str | os.PathLike[str], error: Exception) -> OutputError:
    return OutputError(
        "The file cannot be written",
        where=str(path),
        expected="a file name in a folder that exists and can be written to",
        received=getattr(error, "strerror", None) or str(error),
        remedy="choose another path; what was there is unchanged",
    )
