"""A description and a table of float64 as one file: a zip of two NumPy arrays, nothing executable.

The file is a NumPy ``.npz``: ``description.npy`` holds JSON as bytes, ``values.npy`` the table.
When it is read, sizes are checked before memory is allocated, and pickles are refused.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from truenorm._errors import DataError
from truenorm._records.files import UNREADABLE, replacing
from truenorm._records.moments import Array

LARGEST = 2**28
"""Bytes that a member may unpack to: the statistics of ten million channels are less."""


def write(path: str | os.PathLike[str], description: dict[str, Any], values: Array) -> None:
    """Write the file; whatever happens, there is the old one or the new one, whole."""
    text = np.frombuffer(json.dumps(description).encode(), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, description=text, values=values)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Array]:
    """The description and the table of a file; what is in them is for the caller to check."""
    if not Path(path).is_file():  # a pipe would be waited for
        raise DataError("There is no such file", where=str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            text = _member(archive, "description.npy", np.dtype(np.uint8), 1)
            values = _member(archive, "values.npy", np.dtype(np.float64), 2)
        description = json.loads(text.tobytes())
        if not isinstance(description, dict):
            raise TypeError("the description is not a dict")
    except UNREADABLE as error:
        raise unreadable(path, str(error) or type(error).__name__) from error
    return cast(dict[str, Any], description), values


def unreadable(path: str | os.PathLike[str], why: str) -> DataError:
    """The error of a file that is not what it should be."""
    return DataError(
        "This file does not hold a population",
        where=str(path),
        expected="a whole file that Population.save wrote",
        received=why,
        remedy="collect again, or take another copy of the file",
    )


def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], rank: int) -> Any:
    size = archive.getinfo(name).file_size
    if size > LARGEST:
        raise ValueError(f"{name} of {size} bytes")
    with archive.open(name) as member:
        data = io.BytesIO(member.read(LARGEST))
    version = np.lib.format.read_magic(data)
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, found = header(data)
    length = math.prod(shape) * dtype.itemsize
    if found != dtype or len(shape) != rank or data.getbuffer().nbytes - data.tell() != length:
        raise ValueError(f"{name} of dtype {found} and shape {shape}")
    data.seek(0)
    return np.lib.format.read_array(data, allow_pickle=False)
