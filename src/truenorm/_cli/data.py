"""Data files for the commands: NumPy's and CSV, refused with the place of what is wrong."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from truenorm._errors import DataError
from truenorm._records.files import UNREADABLE
from truenorm._records.moments import Array
from truenorm._records.tables import counted


def read_data(path: Path) -> Any:
    """The arrays of a file, as the tools take them; no code in it is run.

    ``.npy``: one array. ``.npz``: one array, ``x`` and ``y``, or one array per input of the model,
    under its name. ``.csv``: one sample per line, numbers only, with or without a line of names.

    Raises:
        DataError: There is no such file, it is damaged or holds Python objects, or a value is not
            a finite number.
    """
    readers = {".npy": _npy, ".npz": _npz, ".csv": _csv}
    if path.suffix not in readers or not path.is_file():
        raise DataError(
            "There is no such data file" if path.suffix in readers else "Not a data file",
            where=str(path),
            expected="a .npy, .npz or .csv file",
        )
    return readers[path.suffix](path)


FEW = 4
"""Samples that a model is tried on: modes and equality do not depend on more."""


def few_inputs(data: Any) -> Any:
    """The inputs of a few samples."""
    inputs = cast(tuple[Any, ...], data)[0] if isinstance(data, tuple) else data
    if isinstance(inputs, dict):
        return {name: values[:FEW] for name, values in cast(dict[str, Array], inputs).items()}
    return inputs[:FEW]


def _npy(path: Path) -> Array:
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    return _checked(values, str(path))


def _npz(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            arrays = {name.removesuffix(".npy"): _member(archive, name) for name in names}
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    checked = {name: _checked(values, f"{path}: {name}") for name, values in arrays.items()}
    if not checked:
        raise DataError("There are no arrays in this file", where=str(path))
    if len(checked) == 1:
        return next(iter(checked.values()))
    return (checked["x"], checked["y"]) if set(checked) == {"x", "y"} else checked


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _csv(path: Path) -> Array:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            rows = list(_numbers(path, ((lines.line_num, cells) for cells in lines if cells)))
    except DataError:
        raise
    except (csv.Error, *UNREADABLE) as error:
        raise _unreadable(path, error) from error
    if not rows:
        raise DataError("There are no numbers in this file", where=str(path))
    with np.errstate(over="ignore"):  # infinity is refused below
        return _checked(np.asarray(rows, "float32"), str(path))


def _numbers(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Iterator[list[float]]:
    """The rows as numbers; a first line without any number is names, and left out."""
    length = 0
    for count, (line, cells) in enumerate(lines):
        formulas = [cell for cell in cells if cell.lstrip().startswith("=")]
        values = [_number(cell) for cell in cells]
        if count == 0:
            length = len(cells)
            if not formulas and all(value is None for value in values):
                continue
        if len(cells) != length:
            raise DataError(
                "A row is of another length",
                where=f"{path}: line {line}",
                expected=f"{counted(length, 'cell')}, as in the first line",
                received=str(len(cells)),
            )
        for column, (cell, value) in enumerate(zip(cells, values, strict=True), start=1):
            if value is None or not math.isfinite(value):
                raise DataError(
                    "A cell is a formula" if cell in formulas else "A cell is not a finite number",
                    where=f"{path}: line {line}, column {column}",
                    expected="a number such as 0.25",
                    received=repr(cell[:40]),
                )
        yield cast(list[float], values)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _checked(values: Any, where: str) -> Array:
    """The array, if all its values are finite numbers."""
    if values.dtype.kind not in "biuf":
        raise DataError(
            "The data is not numbers",
            where=where,
            expected="real numbers",
            received=values.dtype.name,
        )
    plain = values.dtype.newbyteorder("=") if values.dtype.itemsize <= 8 else np.dtype("f8")
    with np.errstate(over="ignore"):  # infinity is refused below
        values = values.astype(plain, copy=False)  # long doubles, and another machine's byte order
    finite = np.isfinite(values)
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            "The data has values that are not finite numbers",
            where=where,
            received=f"{int((~finite).sum())} of them, the first at index {first}",
            remedy="leave these samples out, or mend them",
        )
    return values


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(
        "The data file cannot be read",
        where=str(path),
        received=(str(error) or type(error).__name__)[:300].rstrip("."),
    )
