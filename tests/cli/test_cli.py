"""The command: what it answers, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import small_models as models
from fresh_process import output_of, truenorm_command

import truenorm as tn
import truenorm._cli
from truenorm import archive
from truenorm._backends import Backend
from truenorm._cli.backend_and_model import _backend_name
from truenorm._cli.data import read_data

pytestmark = pytest.mark.any_backend

EVIL_JSON = rb'"name": "<b>\u001b[31m[i]\n"'
EVIL_SHOWN = "<b>\\x1b[31m[i]\\x0a"


@pytest.fixture(scope="module")
def evil(file: Path) -> Path:
    """The same with a name that is made to do harm."""
    path = file.with_name("evil.keras")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'"name": "bn"', EVIL_JSON))
    return path


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: exit code, output, errors."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        here = [] if name == "demo" else ["--no-isolate"]
        monkeypatch.setattr(sys, "argv", ["truenorm", name, *map(str, arguments), *here])
        monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as stop:
            truenorm._cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


Command = Callable[..., tuple[int, str, str]]


def test_help_names_the_commands_without_importing_keras() -> None:
    code = (
        "import sys; sys.argv = ['truenorm', '--help']\n"
        "from truenorm._cli import main\n"
        "try: main()\n"
        "except SystemExit: print({'keras', 'numpy', 'h5py'} & set(sys.modules))"
    )
    shown = output_of(code)
    for name in ("inspect", "diagnose", "place", "fold", "replace", "recalibrate", "demo"):
        assert name in shown
    assert shown.endswith("set()")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--data", "cifar"], "'cifar' is not one of 'digits', 'breast_cancer'"),
        (["demo", "--backend", "mxnet"], "'mxnet' is not one of 'jax', 'tensorflow', 'torch'"),
        (["demo", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["dmeo"], "No such command 'dmeo'"),
        (["place", "m.keras", "middle", "--out", "n.keras"], "'middle' is not one of"),
        (["fold", "m.keras"], "Missing option '--out'"),
    ],
)
def test_a_wrong_argument_says_what_there_is(arguments: list[str], message: str) -> None:
    done = truenorm_command(*arguments, COLUMNS="200", TERM="dumb")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_backend_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["truenorm", "demo", "--backend", "torch"])
    with pytest.raises(SystemExit) as stop:
        truenorm._cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        'truenorm: The backend torch is not installed. Remedy: pip install "truenorm[torch]".\n'
    )


def test_an_unknown_backend_in_the_environment_is_one_line() -> None:
    done = truenorm_command("demo", KERAS_BACKEND="openvino")
    assert done.returncode == 2
    assert done.stderr == (
        "truenorm: truenorm does not work on this Keras backend (at 'KERAS_BACKEND'). "
        "Expected: jax, tensorflow, torch. Received: openvino. "
        "Remedy: give --backend, or set KERAS_BACKEND to one of these.\n"
    )


@pytest.mark.other_packages
def test_an_existing_folder_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    code, _, errors = command("demo", "--out", tmp_path)
    assert code == 2
    assert "truenorm: The output folder is not empty" in errors
    assert "Remedy: --force replaces an earlier demo there" in errors
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_reader_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "truenorm", "--help"]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, check=False, env=os.environ
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("of", [[], ["study"]])
def test_the_list_of_commands_is_not_cut_at_80_columns(of: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "truenorm", *of, "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    listed = done.stdout.partition("Commands:")[2].partition("Example:")[0]
    assert len(listed.strip().splitlines()) > 2
    assert "..." not in listed


def test_a_file_is_read_without_keras_or_a_framework(evil: Path) -> None:
    code = (
        "import sys; from truenorm._cli import main\n"
        "try: main()\n"
        "except SystemExit as stop:\n"
        "    heavy = {'keras', 'jax', 'torch', 'tensorflow', 'typer', 'numpy', 'h5py'}\n"
        "    print(stop.code, heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(evil), "--static"],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    assert done.stderr == "0 set()\n"
    assert "BatchNormalization in the file of 'sequential" in done.stdout
    assert EVIL_SHOWN in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("backend", [b for b in Backend if b != "tensorflow"])
def test_a_command_leaves_tensorflow_unloaded_beside_another_backend(
    backend: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    monkeypatch.setenv("KERAS_BACKEND", backend)
    shown = output_of(
        "import sys; from truenorm._cli import main\n"
        "sys.argv = ['truenorm', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'tensorflow' in sys.modules)",
        "fold", file, "--out", tmp_path / "folded.keras", "--no-isolate",
    )  # fmt: skip
    assert shown.splitlines()[-1] == "0 False"


def test_a_model_is_inspected_in_each_mode(command: Command, file: Path) -> None:
    code, output, _ = command("inspect", file, "--json")
    found = json.loads(output)
    assert (code, [site["path"] for site in found["sites"]]) == (0, ["bn"])
    observed = {
        entry: modes[0]["calls"][0]["statistics"] for entry, modes in found["modes"].items()
    }
    assert (observed["fit"], observed["predict"]) == ("batch", "moving")


@pytest.mark.long
@pytest.mark.other_packages
def test_a_file_saved_on_one_backend_is_used_on_another(file: Path, tmp_path: Path) -> None:
    other = {"jax": "torch", "tensorflow": "torch", "torch": "tensorflow"}[keras.backend.backend()]
    out = tmp_path / "out.keras"
    done = truenorm_command(
        "fold", str(file), "--out", str(out), "--backend", other, TF_CPP_MIN_LOG_LEVEL="3"
    )
    assert done.returncode == 0, done.stderr
    model, folded = archive.load(file), archive.load(out)
    assert [type(layer).__name__ for layer in folded.layers] == ["Dense", "ReLU", "Dense"]
    x = models.inputs_for(model)
    np.testing.assert_allclose(
        models.predict(folded, x)[0], models.predict(model, x)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("option", "variable", "configured", "installed", "expected"),
    [
        ("torch", "jax", "tensorflow", ["jax", "tensorflow", "torch"], "torch"),
        (None, "jax", "tensorflow", ["jax", "tensorflow", "torch"], "jax"),
        (None, None, "torch", ["jax", "tensorflow", "torch"], "torch"),
        (None, "", "torch", ["jax", "tensorflow", "torch"], "torch"),
        (None, None, "tensorflow", ["torch"], "torch"),  # as Keras writes it, unasked
        (None, None, "openvino", ["tensorflow"], "tensorflow"),
        (None, None, None, ["jax", "tensorflow", "torch"], "jax"),
        (None, None, None, ["torch"], "torch"),
    ],
)
def test_the_backend_is_the_one_asked_for_or_one_that_is_installed(
    option: str | None,
    variable: str | None,
    configured: str | None,
    installed: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name in installed else None
    )
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if variable is not None:
        monkeypatch.setenv("KERAS_BACKEND", variable)
    if configured is not None:
        (tmp_path / ".keras").mkdir()
        (tmp_path / ".keras/keras.json").write_text(json.dumps({"backend": configured}))
    asked = None if option is None else Backend(option)
    assert _backend_name(asked) == expected
    if configured is not None:  # the other place where Keras looks for it
        monkeypatch.setenv("KERAS_HOME", str(tmp_path / ".keras"))
        monkeypatch.setenv("HOME", "/nowhere")
        assert _backend_name(asked) == expected


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"floatx": "float32"}', '{"backend": 3}'])
def test_a_configuration_without_a_backend_decides_nothing(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "keras.json").write_text(text)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND")
    installed = [name for name in ("jax", "tensorflow", "torch") if importlib.util.find_spec(name)]
    assert _backend_name(None) == installed[0]


def test_without_any_backend_the_remedy_is_to_install_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delenv("KERAS_BACKEND")
    with pytest.raises(tn.MissingDependencyError) as caught:
        _backend_name(None)
    assert str(caught.value) == (
        "No backend of Keras is installed. Expected: jax, tensorflow, torch. Remedy: pip install "
        '"truenorm[jax]", or [tensorflow], or [torch].'
    )


@pytest.mark.long
@pytest.mark.other_packages
def test_keras_configuration_decides_in_a_fresh_process(file: Path, tmp_path: Path) -> None:
    other = {"jax": "torch", "tensorflow": "torch", "torch": "tensorflow"}[keras.backend.backend()]
    (tmp_path / "keras.json").write_text(json.dumps({"backend": other}))
    code = (
        "import sys; from truenorm._cli import main\n"
        "try: main()\n"
        "except SystemExit as stop:\n"
        "    import keras; print(stop.code, keras.backend.backend(), file=sys.stderr)"
    )
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "KERAS_BACKEND": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(file), "--json"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == f"0 {other}"


def test_a_rewrite_is_printed_and_saved(command: Command, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.keras"
    code, output, errors = command("place", file, "after_activation", "--out", out)
    assert (code, errors) == (0, "")
    assert "place after_activation: 1 of 1 site changed" in " ".join(output.split())
    assert output.endswith(f"Saved as {out}\n")
    assert [type(k).__name__ for k in archive.load(out).layers] == [
        "Dense", "ReLU", "BatchNormalization", "Dense"]  # fmt: skip
    code, output, _ = command(
        "place", file, "none", "--out", out, "--where", "no such", "--json", "--force"
    )
    assert (code, json.loads(output)["left"][0]["reason"]) == (0, "not selected")
    code, output, _ = command("fold", file, "--out", out, "--where", "no such", "--json", "--force")
    assert (code, json.loads(output)["left"][0]["reason"]) == (0, "not selected")
    assert command("place", file, "none", "--out", out, "--force")[0] == 0
    again = command("place", out, "before_activation", "--insert", "--out", out, "--force")
    assert again[0] == 0
    assert [type(k).__name__ for k in archive.load(out).layers] == [
        "Dense", "BatchNormalization", "ReLU", "Dense"]  # fmt: skip


def test_names_are_shown_and_not_obeyed(command: Command, evil: Path, tmp_path: Path) -> None:
    code, output, errors = command("place", evil, "none", "--out", tmp_path / "out.keras")
    assert "\x1b" not in output + errors
    assert EVIL_SHOWN in output + errors
    if keras.backend.backend() == "tensorflow":
        assert "TensorFlow cannot run a model with a layer of this name" in errors
    assert code == (2 if keras.backend.backend() == "tensorflow" else 0)


def test_outputs_are_kept_by_fold_and_replace(command: Command, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.keras"
    out.write_bytes(file.read_bytes())
    model = archive.load(file)
    x = models.inputs_for(model)
    assert command("replace", out, "--to", "truenorm", "--out", out, "--force")[0] == 0
    swapped = archive.load(out)
    assert type(swapped.layers[1]) is tn.BatchNormalization
    code, output, _ = command("fold", out, "--out", out, "--json", "--force")
    assert (code, json.loads(output)["kind"]) == (0, "fold")
    folded = archive.load(out)
    assert [type(layer).__name__ for layer in folded.layers] == ["Dense", "ReLU", "Dense"]
    for changed in (swapped, folded):
        np.testing.assert_allclose(
            models.predict(changed, x)[0], models.predict(model, x)[0], rtol=1e-4, atol=1e-5
        )


def test_statistics_become_those_of_the_data(command: Command, file: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.csv", tmp_path / "out.keras"
    x = np.random.default_rng(0).normal(3, 2, (64, 5)).round(3).astype("float32")
    np.savetxt(data, x, delimiter=",", header="a,b,c,d,e", comments="")
    code, output, _ = command("recalibrate", file, "--data", data, "--out", out)
    assert code == 0
    assert "Recalibrated 1 layer over 64 samples" in output
    done = archive.load(out)
    hidden = np.asarray(keras.ops.convert_to_numpy(done.layers[0](x)))
    moving = keras.ops.convert_to_numpy(done.layers[1].moving_mean)
    np.testing.assert_allclose(moving, hidden.mean(0), rtol=1e-4, atol=1e-5)


def test_diagnose_exits_with_what_it_found(command: Command, file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(30, 1, (64, 5)).astype("float32"))
    code, output, _ = command("diagnose", file, "--data", tmp_path / "x.npy", "--select", "TN1")
    assert code == 1
    assert "TN1" in output
    code, output, _ = command("diagnose", file, "--select", "TN1", "--ignore", "TN1", "--json")
    assert (code, json.loads(output)["findings"]) == (0, [])
    code, _, errors = command("diagnose", file, "--select", "E501")
    assert code == 2
    assert "No rule has a code that begins so" in errors


def test_limits_and_errors_are_one_line(command: Command, file: Path, tmp_path: Path) -> None:
    code, output, errors = command(
        "fold", file, "--out", tmp_path / "o.keras", "--max-parameters", 10
    )
    assert (code, output) == (2, "")
    assert errors.startswith("truenorm: The model has more parameters than are allowed")
    assert errors.count("\n") == 1
    code, _, errors = command(
        "fold", file, "--out", tmp_path / "o.keras", "--import", "no_such_module"
    )
    assert (code, "cannot be imported (at 'no_such_module')" in errors) == (2, True)
    code, _, errors = command("inspect", tmp_path / "no\x1b[31m.keras", "--static")
    assert (code, "no\\x1b[31m.keras" in errors) == (2, True)
    code, _, errors = command("fold", file, "--out", tmp_path / "out.h5")
    assert (code, "a name that ends in .keras" in errors) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_130(command: Command, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("truenorm._cli.models.model_of", interrupt)
    assert command("inspect", file)[0] == 130


def test_too_little_memory_is_one_line(
    command: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("truenorm._cli.models.model_of", exhaust)
    code, output, errors = command("inspect", file)
    assert (code, output) == (2, "")
    assert errors == "truenorm: There is not enough memory to run this model.\n"


def test_a_reader_that_has_gone_ends_an_inspection_quietly(file: Path) -> None:
    for option in ([], ["--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        arguments = [sys.executable, "-m", "truenorm", "inspect", str(file), "--static", *option]
        done = subprocess.run(
            arguments, stdout=writing, stderr=subprocess.PIPE, check=False, env=os.environ
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n3,nan\n", "A cell is not a finite number (at '{}: line 2, column 2')"),
        ("1,2\n3,inf\n", "Received: 'inf'."),
        ("1,2\n3,1e39\n", "The data has values that are not finite numbers"),
        ("1,2\n3,x\n", "Expected: a number such as 0.25. Received: 'x'."),
        ("1,2\n3,\n", "Received: ''."),
        ("1,2\n3\n", "A row is of another length (at '{}: line 2'). Expected: 2 cells, as in the "
                     "first line. Received: 1."),
        ("a,b\n1,2,3\n", "Expected: 2 cells"),
        ("1,2\n3,=1+1\n", "A cell is a formula (at '{}: line 2, column 2')"),
        ("=a,b\n1,2\n", "A cell is a formula (at '{}: line 1, column 1')"),
        ("a,b\n", "There are no numbers in this file"),
        ("", "There are no numbers in this file"),
        ('1,"2\n', "The data file cannot be read"),
        ("1,\xff\n", "The data file cannot be read"),
        ("1,\0\n", "A cell is not a finite number"),
    ],
)  # fmt: skip
def test_bad_csv_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(tn.DataError) as refused:
        read_data(path)
    assert message.format(path) in str(refused.value)


def test_csv_may_have_a_line_of_names(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('\ufeffa,"b"\r\n1,2e0\r\n\r\n-3, 4\r\n', encoding="utf-8")
    values = read_data(tmp_path / "data.csv")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[1, 2], [-3, 4]])


def test_numpys_files_are_read_without_pickle(tmp_path: Path) -> None:
    x, y, path = np.eye(3, dtype="float32"), np.arange(3), tmp_path / "data.npz"
    np.savez(path, images=x)
    np.testing.assert_array_equal(read_data(path), x)
    np.savez(path, x=x, y=y)
    np.testing.assert_array_equal(read_data(path)[1], y)
    np.savez(path, left=x, right=y)
    assert set(read_data(path)) == {"left", "right"}
    bad = {
        "object.npy": np.array([{}], dtype=object),
        "text.npy": np.array(["a"]),
        "nan.npy": np.array([[0.0, 1.0], [np.nan, 2.0]]),
    }
    for name, values in bad.items():
        np.save(tmp_path / name, values, allow_pickle=True)
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "object.npz", x=bad["object.npy"])
    content = (tmp_path / "nan.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(content[:-1])
    (tmp_path / "long.npy").write_bytes(content.replace(b"(2, 2)", b"(2, 9)"))
    (tmp_path / "no.npz").write_bytes(path.read_bytes()[:50])
    for name, message in {
        "object.npy": "Python objects in dtype",
        "object.npz": "allow_pickle=False",
        "text.npy": "Expected: real numbers. Received: str32.",
        "nan.npy": "1 of them, the first at index (1, 0).",
        "none.npz": "There are no arrays in this file",
        "short.npy": "The data file cannot be read",
        "long.npy": "The data file cannot be read",
        "no.npz": "The data file cannot be read",
        "missing.npy": "There is no such data file",
        "data.pkl": "Expected: a .npy, .npz or .csv file.",
    }.items():
        with pytest.raises(tn.DataError) as refused:
            read_data(tmp_path / name)
        assert message in str(refused.value), name
