"""Damaged and made-up files: each reader gives a result or one clear line, whatever the bytes are.

A few examples in each run of all tests; thousands with ``make fuzz``.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import truenorm as tn
from truenorm import archive
from truenorm._cli.data import read_data
from truenorm._records.moments import Moments

pytestmark = pytest.mark.any_backend

EXAMPLES = 2_500 if settings.get_current_profile_name() == "fuzz" else 40


def _npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@cache
def _npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.eye(4, dtype="f4"), y=np.arange(4))
    return file.getvalue()


@cache
def _population() -> bytes:
    file = Path(_FOLDER.name) / "population.npz"
    one = Moments.of(np.random.default_rng(0).normal(size=(8, 3)))
    tn.Population({"bn": one}, samples=8, batches=1, upstream="batch", passes=1).save(file)
    return file.read_bytes()


CONFIG = {
    "module": "keras", "class_name": "Sequential", "registered_name": None,
    "config": {"name": "m", "layers": [
        {"module": "keras.layers", "class_name": "BatchNormalization", "registered_name": None,
         "config": {"name": "bn", "axis": -1, "momentum": 0.99, "epsilon": 0.001},
         "build_config": {"input_shape": [None, 3]}}]},
}  # fmt: skip


@cache
def _variables() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as variables:
        for index in range(4):
            path = f"layers/batch_normalization/vars/{index}"
            variables[path] = np.arange(3, dtype="f4") + 1
    return file.getvalue()


def _keras(variables: bytes | None = None, config: bytes | None = None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("config.json", config or json.dumps(CONFIG))
        made.writestr("metadata.json", '{"keras_version": "3.15.1", "date_saved": "today"}')
        made.writestr("model.weights.h5", variables or _variables())
    return file.getvalue()


@cache
def _old() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as old:
        old.attrs["model_config"] = json.dumps(CONFIG)
        group = old.create_group("model_weights/bn")
        names = [f"bn/{name}:0" for name in ("gamma", "beta", "moving_mean", "moving_variance")]
        group.attrs["weight_names"] = [name.encode() for name in names]
        for name in names:
            group[name] = np.arange(3, dtype="f4") + 1
    return file.getvalue()


_FOLDER = tempfile.TemporaryDirectory(prefix="truenorm-fuzz-")  # gone when the process ends


SEEDS: dict[str, tuple[Callable[[], bytes], Callable[[Path], Any]]] = {
    "f4.npy": (lambda: _npy(np.eye(5, 3, dtype="f4")), read_data),
    "i8.npy": (lambda: _npy(np.arange(12).reshape(4, 3)), read_data),
    "data.npz": (_npz, read_data),
    "data.csv": (lambda: b'a,"b"\n1,2.5\n-3e2, 4\n', read_data),
    "population.npz": (_population, tn.Population.load),
    "model.keras": (_keras, archive.read),
    "model.h5": (_old, archive.read),
}


@st.composite
def mutated(draw: st.DrawFn, seed: bytes) -> bytes:
    """The seed with bytes changed, cut out, put in, doubled or moved; or its beginning."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 16))
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "double", "end"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            data[at : at + length] = draw(st.sampled_from(NASTY))
        elif how == "cut":
            del data[at : at + length]
        elif how == "insert":
            data[at:at] = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(NASTY)))
        elif how == "double":
            data[at:at] = data[at : at + length]
        elif how == "end":
            del data[at:]
    return bytes(data)


NASTY = [
    b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x00" * 8, b"\xff" * 8, b"-1", b"1" * 400,
    b"9" * 20, b"[" * 300, b"(" * 300, b"{'descr': ", b"'|O'", b"'>f16'", b"'<g'", b"'m8[s]'",
    b"None", b"1e999", b"nan", b'"', b"\n", b",", b"=1+1", b"\xef\xbb\xbf", b"PK\x03\x04",
    b"\x89HDF\r\n\x1a\n", b"\x63", b"\x0e",
]  # fmt: skip


@contextmanager
def one_clear_line() -> Iterator[None]:
    """A result, or an error of ours that is one line; the readers' warnings are no matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
            event("read")
        except tn.TruenormError as error:
            assert 0 < len(str(error)) < 3_000  # noqa: PT017
            event("refused")


@pytest.mark.parametrize("name", SEEDS)
@given(data=st.data())
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_bytes_changed_anywhere(name: str, data: st.DataObject) -> None:
    make, read = SEEDS[name]
    path = Path(_FOLDER.name) / name
    path.write_bytes(data.draw(mutated(make())))
    with one_clear_line():
        read(path)


@given(data=st.data())
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_members_changed_under_right_checksums(data: st.DataObject) -> None:
    """Past the checksum: what is inside of the archive is made up."""
    path = Path(_FOLDER.name) / "inner.keras"
    variables = data.draw(st.one_of(st.none(), mutated(_variables())))
    config = data.draw(st.one_of(st.none(), mutated(json.dumps(CONFIG).encode())))
    path.write_bytes(_keras(variables, config))
    with one_clear_line():
        archive.read(path)
