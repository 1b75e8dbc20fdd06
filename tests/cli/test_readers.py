"""Data files, modules and arguments that are damaged or made up: one line, in our form."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import small_models as models
from altered_keras_files import with_weights

import truenorm as tn
import truenorm._cli
from truenorm import archive
from truenorm._cli.data import read_data

pytestmark = pytest.mark.any_backend


def npy(values: np.ndarray, path: Path) -> Path:
    np.save(path, values)
    return path


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f8", ">i2", ">u4", ">f2", "longdouble"])
def test_numbers_of_other_machines_are_converted(dtype: str, tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, 250]], dtype)
    read = read_data(npy(values, tmp_path / "x.npy"))
    assert read.dtype.isnative
    assert read.dtype.itemsize == min(values.dtype.itemsize, 8)
    np.testing.assert_array_equal(read, values.astype("f8"))
    np.savez(tmp_path / "x.npz", images=values)
    np.testing.assert_array_equal(read_data(tmp_path / "x.npz"), read)


def test_a_long_double_beyond_a_double_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tn.DataError, match="1 of them, the first at index"):
        read_data(npy(np.array([1, np.longdouble("1e4000")]), tmp_path / "x.npy"))


def test_a_header_that_is_not_closed_is_refused(tmp_path: Path) -> None:
    content = npy(np.eye(3), tmp_path / "x.npy").read_bytes()
    for old, new in ((b"(3, 3)", b"(3, 3 "), (b"'descr'", b'"descr '), (b"(3, 3)", b"((((((")):
        (tmp_path / "x.npy").write_bytes(content.replace(old, new))
        with pytest.raises(tn.DataError, match="The data file cannot be read"):
            read_data(tmp_path / "x.npy")


def test_an_npz_that_is_called_npy_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.eye(3))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(tn.DataError, match="The data file cannot be read"):
        read_data(tmp_path / "x.npy")


def compressed_by(method: int) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_LZMA) as file:
        content = io.BytesIO()
        np.save(content, np.eye(64))
        file.writestr("x.npy", content.getvalue())
    data = bytearray(made.getvalue())
    central = data.index(b"PK\x01\x02")
    if method == 14:  # LZMA, with its properties and some of its data destroyed
        data[39:60] = b"\xff" * 21
    elif method == 0:  # encrypted
        data[6] |= 1
        data[central + 8] |= 1
    else:
        data[8] = data[central + 10] = method
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "received"),
    [
        (compressed_by(14), ""),
        (compressed_by(99), "That compression method is not supported"),
        (compressed_by(0), "encrypted"),
        (b"\x93NUMPY\x01\x00", "File is not a zip file"),
        (b"", "File is not a zip file"),
        (b"hello", "File is not a zip file"),
    ],
)
def test_an_npz_that_is_none_is_refused(content: bytes, received: str, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(tn.DataError) as refused:
        read_data(tmp_path / "x.npz")
    assert str(refused.value).startswith("The data file cannot be read (at '")
    assert received in str(refused.value)
    with pytest.raises(tn.DataError, match="This file does not hold a population"):
        tn.Population.load(tmp_path / "x.npz")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("x.npy", "x.npz", "x.csv", "x.keras"):
        os.mkfifo(tmp_path / name)
    for name in ("x.npy", "x.npz", "x.csv"):
        with pytest.raises(tn.DataError, match="There is no such data file"):
            read_data(tmp_path / name)
    with pytest.raises(tn.DataError, match="There is no such file"):
        tn.Population.load(tmp_path / "x.npz")
    with pytest.raises(tn.ArchiveError, match=r"There is no such \.keras file"):
        archive.read(tmp_path / "x.keras")


def test_a_nul_in_a_path_is_refused(tmp_path: Path) -> None:
    model, path = models.dense(), tmp_path / "a\0.keras"
    for opening in (archive.read, archive.load):
        with pytest.raises(tn.ArchiveError, match=r"There is no such \.keras file"):
            opening(path)
    with pytest.raises(tn.OutputError, match="The file cannot be written"):
        archive.save(model, path)
    with pytest.raises(tn.DataError, match="There is no such"):
        read_data(tmp_path / "a\0.npy")
    with pytest.raises(tn.DataError, match="There is no such"):
        tn.Population.load(tmp_path / "a\0.npz")


def a_time(group: h5py.File, name: str) -> None:
    space = h5py.h5s.create_simple((1,))
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.UNIX_D32LE, space)


def time_as_data(variables: h5py.File) -> None:
    a_time(variables, "other")


def time_as_variable(variables: h5py.File) -> None:
    del variables["layers/batch_normalization/vars/3"]
    a_time(variables, "layers/batch_normalization/vars/3")


def time_as_attribute(variables: h5py.File) -> None:
    variable = variables["layers/batch_normalization/vars/3"]
    space = h5py.h5s.create(h5py.h5s.SCALAR)
    h5py.h5a.create(variable.id, b"dtype", h5py.h5t.UNIX_D32LE, space)


@pytest.mark.parametrize("change", [time_as_data, time_as_variable, time_as_attribute])
def test_an_hdf5_type_that_numpy_does_not_have_is_refused(change: object, tmp_path: Path) -> None:
    archive.save(models.dense(), tmp_path / "model.keras")
    path = with_weights(tmp_path / "model.keras", change, tmp_path / "evil.keras")  # type: ignore[arg-type]
    with pytest.raises(tn.ArchiveError, match=r"damaged or not a \.keras file"):
        archive.read(path)


@pytest.mark.parametrize(
    ("name", "received"),
    [
        ("broken_module", "ZeroDivisionError: division by zero"),
        ("leaving_module", "SystemExit: 3"),
        (".relative", "TypeError: "),
        ("", "ValueError: Empty module name"),
        ("a\0b", "ModuleNotFoundError: "),
        ("no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    name: str, received: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "leaving_module.py").write_text("import sys; sys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    archive.save(models.dense(), tmp_path / "model.keras")
    with pytest.raises(tn.OptionError) as refused:
        archive.load(tmp_path / "model.keras", imports=[name])
    assert "The module with custom classes cannot be imported" in str(refused.value)
    assert received in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recalibrate", "m.keras", "--data", "d", "--out", "o", "--batch-size", "0"],
         "1. Remedy: truenorm recalibrate --help shows what there is."),
        (["inspect", "m.keras", "--backend", "mxnet"],
         "'mxnet' is not one of 'jax', 'tensorflow', 'torch'. Remedy: truenorm inspect --help"),
        (["fold", "m.keras"],
         "Missing option '--out'. Remedy: truenorm fold --help shows what there is."),
        (["dmeo"], "Did you mean 'demo'? Remedy: truenorm --help"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line_as_every_error_is(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["truenorm", *arguments])
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    with pytest.raises(SystemExit) as stop:
        truenorm._cli.main()
    output, errors = capsys.readouterr()
    assert (stop.value.code, output) == (2, "")
    assert errors.startswith("truenorm: ")
    assert errors.count("\n") == 1
    assert message in errors
