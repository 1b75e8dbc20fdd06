"""When the compiled library is not used: missing, broken, or of other code than this."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from layer_cases import EPSILON, array, error, gradients, tensor

from truenorm import _kernels as kernels
from truenorm._kernels import library, reference

ONCE = {"jax": "_registered", "tensorflow": "_operations", "torch": "_parallel"}


@contextlib.contextmanager
def as_if_new(**changed: Any) -> Iterator[Any]:
    """As in a process that has asked for no library yet, with names of ``library`` changed.

    Gives the module that decides what the library takes.
    """
    backend = keras.config.backend()
    native = importlib.import_module(f"truenorm._kernels.{backend}.native")
    with contextlib.ExitStack() as stack:
        for name, value in changed.items():
            stack.enter_context(mock.patch.object(library, name, value))
        for module, name in ((library, "loaded"), (native, ONCE[backend])):
            fresh = functools.cache(getattr(module, name).__wrapped__)
            stack.enter_context(mock.patch.object(module, name, fresh))
        takes = "passes" if backend == "torch" else "native"
        yield importlib.import_module(f"truenorm._kernels.{backend}.{takes}")


def check_that_the_framework_does_it(passes: Any) -> None:
    """The numbers of a training step are right, and the library takes no part in them."""
    with keras.device("cpu:0"):  # on a GPU it never does
        _check_on_a_processor(passes)


def _check_on_a_processor(passes: Any) -> None:
    x, gradient = (np.random.default_rng(k).normal(size=(40, 3)) for k in (0, 1))
    taken = []

    def call(x: Any) -> Any:
        taken.append(passes.takes(x))
        return kernels.normalize(x, None, None, kernels.Options(-1, EPSILON)).output

    output, (d_x,) = gradients(call, [tensor(x)], tensor(gradient))
    assert not any(taken)
    assert taken
    if keras.config.backend() == "torch":
        output = output.detach()
    assert error(array(output), reference.forward(np.float32(x)).output) < 1e-6
    assert error(array(d_x), reference.backward(gradient, np.float32(x)).x) < 1e-6


def check_that_it_is_not_used(reason: str, **changed: Any) -> None:
    """The framework's path, and one warning that says why."""
    with as_if_new(**changed) as native:
        with pytest.warns(RuntimeWarning, match=rf"^truenorm runs without .*({reason}).*Remedy: "):
            assert library.loaded() is None
        check_that_the_framework_does_it(native)


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(share * len(whole))]


def _for_another_machine(whole: bytes) -> bytes:
    """The number of the machine stands in bytes 18 and 19 of an ELF file; 243 is RISC-V."""
    return whole[:18] + struct.pack("=H", 243) + whole[20:]


BROKEN: dict[str, Callable[[bytes], bytes] | None] = {
    "missing": None,
    "empty": _cut(0),
    "a_text": lambda _: b"version https://git-lfs.github.com/spec/v1\n" * 9,
    "the_head_alone": lambda whole: whole[:64],
    **{f"cut_at_{share}": _cut(share) for share in (0.01, 0.3, 0.6, 0.97)},
    "without_its_last_byte": lambda whole: whole[:-1],
    "for_another_machine": _for_another_machine,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_library_is_not_used(how: str, tmp_path: Path) -> None:
    path, change = tmp_path / "libtruenorm.so", BROKEN[how]
    if change is not None:
        path.write_bytes(change(library.PATH.read_bytes()))
    check_that_it_is_not_used(
        "missing" if how == "missing" else "cut off|not for|not that", PATH=path
    )


@pytest.mark.parametrize("open_to_all", ["folder", "file"])
def test_a_library_that_anybody_may_write_to_is_not_used(open_to_all: str, tmp_path: Path) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    path = Path(shutil.copy(library.PATH, folder))
    (folder if open_to_all == "folder" else path).chmod(0o777)
    check_that_it_is_not_used("any user of this machine may write", PATH=path)
    folder.chmod(0o1777)  # as that of temporary files: nobody may replace another's file there
    path.chmod(0o755)
    with as_if_new(PATH=path):
        assert library.flaw() is None


def test_no_warning_where_the_library_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUENORM_NATIVE", "0")
    with as_if_new() as passes:
        assert library.loaded() is None
        check_that_the_framework_does_it(passes)


def test_the_whole_library_is_used() -> None:
    with as_if_new() as passes:
        assert library.loaded() is not None
        native = passes.native if keras.config.backend() == "torch" else passes
        assert getattr(native, ONCE[keras.config.backend()])()


def test_a_library_of_another_interface_is_not_used() -> None:
    check_that_it_is_not_used("not that of this version", INTERFACE=library.INTERFACE + 1)


def test_a_library_with_another_call_is_not_used() -> None:
    check_that_it_is_not_used(
        "not that of this version", CALL=struct.Struct(library.CALL.format + "P")
    )


def test_a_library_that_is_somebody_elses_is_not_used() -> None:
    check_that_it_is_not_used("not that of this version", PATH=Path(np.random.mtrand.__file__))


def test_the_call_is_declared_alike_in_python_and_in_c() -> None:
    header = (library.PATH.parent / "batchnorm.h").read_text()
    (interface,) = re.findall(r"#define TN_INTERFACE (\d+)", header)
    assert int(interface) == library.INTERFACE
    (codes,) = re.findall(r"enum \{ (TN_FLOAT32.*?) \};", header)
    names = [name.removeprefix("TN_").lower() for name in codes.split(", ")]
    assert {name: code for code, name in enumerate(names)} == library.DTYPES
    (fields,) = re.findall(r"typedef struct \{(.*?)\} tn_call;", header, re.DOTALL)
    declarations = re.sub(r"/\*.*?\*/", "", fields, flags=re.DOTALL).split(";")[:-1]
    kinds = {"int64_t": "q", "int32_t": "i", "double": "d"}
    found, layout = [], "@"
    for declaration in declarations:
        kind, names = re.fullmatch(r"\s*((?:const )?\w+) (.*)", declaration).groups()
        for name in names.split(", "):
            found.append(name.strip("*"))
            layout += kinds.get(kind, "P")
    assert tuple(found) == library.Call._fields
    assert struct.Struct(layout).size == library.CALL.size
    assert layout == re.sub(r"(\d+)(\w)", lambda m: int(m[1]) * m[2], library.CALL.format)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="TensorFlow's C interface")
def test_without_a_function_of_tensorflow_it_registers_nothing(tmp_path: Path) -> None:
    whole = library.PATH.read_bytes()
    names = set(re.findall(rb"\0(TF_\w+)(?=\0)", whole))
    assert len(names) == 27
    for number, name in enumerate(sorted(names)):
        path = tmp_path / f"libtruenorm{number}.so"
        path.write_bytes(whole.replace(b"\0" + name + b"\0", b"\0No" + name[2:] + b"\0"))
        with as_if_new(PATH=path) as native:
            assert library.loaded() is not None
            assert native._operations() is None, name
    with as_if_new(PATH=path) as native:
        check_that_the_framework_does_it(native)
