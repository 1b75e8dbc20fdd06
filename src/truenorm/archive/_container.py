"""The container of a ``.keras`` file: a zip archive with JSON and HDF5 in it.

Everything is checked before it is used: how many members there are and what they are called, what
they unpack to, how deep the JSON goes, where the HDF5 links point.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

import h5py

from truenorm._errors import ArchiveError
from truenorm._records.files import UNREADABLE
from truenorm.archive._member import MIB, checked

low: Any = h5py
"""Of its interface to the library, which is untyped."""

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"

MOST_MEMBERS = 10_000
MOST_JSON = 64 * MIB
MOST_DEPTH = 200
MOST_OBJECTS = 1_000_000
EXPANSION, ALLOWANCE = 20, 16 * MIB
"""What a file may unpack to: so many times its own size, and so much on top. Keras does not
compress its archives, and trained weights compress to little less."""
STORED_AT_LEAST = 1 / 1000
"""What a large HDF5 variable must have on disk of the bytes that its shape declares."""


class Named(Protocol):
    """An open file that knows its name."""

    @property
    def filename(self) -> Any:
        """Its path."""
        ...


@contextmanager
def opened(path: str | os.PathLike[str]) -> Generator[zipfile.ZipFile]:
    """The archive, if it is safe to read.

    Raises:
        ArchiveError: It is not a ``.keras`` file, is broken, or is made to do harm.
    """
    file = Path(path)
    if file.suffix != ".keras" or not file.is_file():
        raise ArchiveError(
            "There is no such .keras file" if file.suffix == ".keras" else "Not a .keras file",
            where=str(path),
            expected="a file as model.save('name.keras') writes it",
            received="a folder" if file.is_dir() else None,
        )
    with told(str(path)), zipfile.ZipFile(file) as archive:
        _check_members(archive, file.stat().st_size)
        yield archive


def verify_checksums(archive: zipfile.ZipFile) -> None:
    """Read every member to its end; a flipped bit or a short member raises."""
    damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"Bad checksum of {damaged!r}")


def read_json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    """A JSON member that is an object."""
    info = _member(archive, name)
    if info.file_size > MOST_JSON:
        raise _refused(archive, name, f"{MOST_JSON // MIB} MiB at most", f"{info.file_size} bytes")
    return parse_json(archive, name, archive.read(info))


def parse_json(owner: Named, name: str, text: bytes) -> dict[str, Any]:
    """JSON that is an object, and not nested too deep."""
    deepest = _depth(text)
    if deepest > MOST_DEPTH:
        raise _refused(owner, name, f"JSON nested {MOST_DEPTH} deep at most", f"{deepest}")
    value = json.loads(text)
    if not isinstance(value, dict):
        raise _refused(owner, name, "a JSON object", type(value).__name__)
    return cast(dict[str, Any], value)


@contextmanager
def weights(archive: zipfile.ZipFile) -> Generator[h5py.File]:
    """The file of the variables, if all that is in it is in it: no link leads elsewhere."""
    with _variables(archive) as file:
        check_links(archive, file)
        yield file


def numbers(archive: zipfile.ZipFile) -> int:
    """How many numbers are stored as variables, after the same checks."""
    with _variables(archive) as file:
        return check_links(archive, file)


@contextmanager
def _variables(archive: zipfile.ZipFile) -> Generator[h5py.File]:
    with (
        checked(archive, _member(archive, WEIGHTS)) as member,
        h5py.File(member, "r") as file,
    ):
        yield file


@contextmanager
def told(path: str) -> Generator[None]:
    """Errors of a damaged file, in one shape."""
    try:
        yield
    except ArchiveError:
        raise
    except UNREADABLE as error:
        raise ArchiveError(
            f"The file is damaged or not a {Path(path).suffix} file",
            where=path,
            expected=f"a file as model.save('name{Path(path).suffix}') writes it",
            received=(str(error) or type(error).__name__)[:300],
            remedy="get or save the file again",
        ) from error


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(name)
    except KeyError:
        raise _refused(archive, name, "a member of this name", "none") from None


def _refused(owner: Named, what: str, expected: str, received: str | None = None) -> ArchiveError:
    return ArchiveError(
        "The file is not as Keras writes it, and is not opened",
        where=f"{owner.filename}: {what}",
        expected=expected,
        received=received,
        remedy="do not load this file anywhere unless you know why it is so",
    )


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        raise _refused(archive, "members", f"{MOST_MEMBERS} at most", str(len(members)))
    seen: set[str] = set()
    for member in members:
        name = member.filename
        parts = PurePosixPath(name).parts
        if name in seen:
            raise _refused(archive, name, "each member once", "two of this name")
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
            raise _refused(archive, name, "a path inside the archive")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(archive, name, "a file", "a link or a special file")
        seen.add(name)
    most = EXPANSION * size + ALLOWANCE
    unpacked = sum(member.file_size for member in members)
    if unpacked > most:
        raise _refused(archive, "all members", f"{most} bytes at most", f"{unpacked} unpacked")
    if sum(member.compress_size for member in members) > size:
        raise _refused(archive, "all members", "members side by side", "members that overlap")


def _depth(text: bytes) -> int:
    """How deep JSON is nested: brackets counted outside of strings, without recursion."""
    outside = re.sub(rb'"(?:[^"\\]|\\.)*+"?', b"", text, flags=re.DOTALL)
    brackets = outside.translate(None, _NO_BRACKETS)
    return max(accumulate(1 if one in b"[{" else -1 for one in brackets), default=0)


_NO_BRACKETS = bytes({*range(256)} - {*b"[]{}"})


def check_links(owner: Named, file: h5py.File, place: str = WEIGHTS) -> int:
    """Refuse variables that are elsewhere: h5py would follow links to other files of this machine.

    Gives how many numbers the others hold. Not by ``visititems``: an error inside it, as a damaged
    file makes, breaks h5py's own lock.
    """
    groups: list[tuple[Any, str]] = [(file.id, place)]
    seen: set[int] = set()
    objects = held = 0
    while groups:
        group, within = groups.pop()
        for name in group:
            where = f"{within}/{name.decode(errors='replace')}"
            objects += 1
            if objects > MOST_OBJECTS:
                raise _refused(owner, where, f"{MOST_OBJECTS} objects at most", "more")
            kind = group.links.get_info(name).type
            if kind != low.h5l.TYPE_HARD:
                received = _LINKS.get(kind, "a link of another kind")
                raise _refused(owner, where, "data in the file itself", received)
            value = low.h5o.open(group, name)
            if isinstance(value, low.h5d.DatasetID):
                held += _checked_size(owner, value, where)
            elif isinstance(value, low.h5g.GroupID):
                address = low.h5o.get_info(value).addr
                if address not in seen:  # a group can be its own member
                    seen.add(address)
                    groups.append((value, where))
    return held


_LINKS = {low.h5l.TYPE_SOFT: "SoftLink", low.h5l.TYPE_EXTERNAL: "ExternalLink"}


def _checked_size(owner: Named, value: Any, where: str) -> int:
    """How many numbers a variable holds, which have to be there."""
    kept = value.get_create_plist()
    if kept.get_external_count() or kept.get_layout() == low.h5d.VIRTUAL:
        raise _refused(owner, where, "data in the file itself", "data that is kept elsewhere")
    size = math.prod(value.shape or ())
    declared = size * value.dtype.itemsize  # which refuses a type that NumPy has not
    stored = value.get_storage_size()
    if declared > ALLOWANCE and stored < declared * STORED_AT_LEAST:
        raise _refused(owner, where, f"{declared} bytes, as declared", f"{stored} stored")
    return size
