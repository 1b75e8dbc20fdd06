"""Files with truenorm's layer load wherever truenorm is imported, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import truenorm as tn

pytestmark = [pytest.mark.any_backend, pytest.mark.long]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registration") / "model.keras"
    keras.Sequential([keras.Input((3,)), tn.BatchNormalization(name="bn")]).save(path)
    return path


def fresh(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import keras, truenorm",
        "import truenorm, keras",
        "import truenorm.archive, keras.saving",
    ],
)
def test_importing_truenorm_is_enough_to_load_a_file(imports: str, file: Path) -> None:
    code = f"{imports}; import sys; print(type(keras.saving.load_model(sys.argv[1]).layers[0]))"
    assert fresh(code, file) == str(tn.BatchNormalization)


def test_a_frozen_map_is_loaded_as_well(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")])
    tn.replace(model, to="affine").model.save(tmp_path / "model.keras")
    code = "import truenorm, keras, sys; print(keras.saving.load_model(sys.argv[1]).layers[0].name)"
    assert fresh(code, tmp_path / "model.keras") == "bn"


def test_an_import_of_keras_that_failed_may_be_tried_again(file: Path) -> None:
    code = (
        "import os, sys, truenorm\n"
        "try: import keras\n"
        "except ValueError: os.environ['KERAS_BACKEND'] = sys.argv[2]\n"
        "for name in [n for n in sys.modules if n.startswith('keras')]: del sys.modules[name]\n"
        "import keras; print(keras.saving.load_model(sys.argv[1]).layers[0].name)"
    )
    assert fresh(code, file, keras.config.backend(), KERAS_BACKEND="no-such-backend") == "bn"


def test_spawned_workers_load_a_file(file: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, sys\n"
        "import truenorm, keras\n"
        "def names(path):\n"
        "    return [layer.name for layer in keras.saving.load_model(path).layers]\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(names, [sys.argv[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, program, file], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[['bn']]\n", done.stderr


def test_the_import_of_keras_is_as_ever_otherwise() -> None:
    code = (
        "import truenorm, importlib.util, inspect, keras, pickle\n"
        "print(importlib.util.find_spec('keras').name, keras.__spec__.origin == keras.__file__,\n"
        "      'import' in inspect.getsource(keras), importlib.reload(keras) is keras)"
    )
    assert fresh(code) == "keras True True True"


def test_any_room_may_be_imported_first() -> None:
    """Before Keras is: the layer is registered once all is there that it needs."""
    root = Path(tn.__file__).parent
    rooms = [p for p in root.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    names = sorted(f"truenorm.{p.stem}" for p in rooms if p.stem not in ("__init__", "__main__"))
    assert len(names) > 15
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("first_imports.py"), *names],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KERAS_BACKEND": keras.config.backend()},
    )
    assert done.returncode == 0, done.stderr
