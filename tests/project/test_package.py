"""The package as users meet it: public names, light imports, errors, documentation examples."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import truenorm as tn

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    return result.stdout.strip()


def test_public_names_are_sorted_and_exist() -> None:
    assert tn.__all__ == sorted(tn.__all__)
    for name in tn.__all__:
        assert getattr(tn, name).__doc__, name
    assert set(tn.__all__) <= set(dir(tn))
    with pytest.raises(AttributeError, match="nothing"):
        tn.nothing  # noqa: B018


def test_every_public_name_is_in_the_readme_or_the_docs() -> None:
    text = "".join(p.read_text("utf-8") for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    missing = [name for name in tn.__all__ if name not in text]
    assert not missing


def test_the_installed_version_is_the_packages_own() -> None:
    assert importlib.metadata.version("truenorm") == tn.__version__


def test_public_modules_need_no_import_of_their_own() -> None:
    shown = run(
        "import truenorm as tn; print(tn.archive.load.__name__, tn.callbacks.Recalibrate.__name__,"
        " tn.cluster.collect.__name__, tn.report.save.__name__); from truenorm import *;"
        " print(fold.__name__, archive.__name__)"
    )
    assert shown == "load Recalibrate collect save\nfold truenorm.archive"


def test_importing_truenorm_does_not_import_keras_or_a_framework() -> None:
    heavy = "{'keras', 'jax', 'torch', 'tensorflow', 'matplotlib', 'scipy', 'sklearn', 'typer'}"
    assert run(f"import sys, truenorm; print({heavy} & set(sys.modules))") == "set()"


def test_no_framework_beyond_kerass_own_is_imported() -> None:
    frameworks = "{'jax', 'torch', 'tensorflow'}"
    code = (
        f"import sys, keras; before = {frameworks} & set(sys.modules); import truenorm; "
        f"[getattr(truenorm, name) for name in truenorm.__all__]; "
        f"print(({frameworks} & set(sys.modules)) - before)"
    )
    assert run(code) == "set()"


def test_a_backend_that_is_missing_is_said_with_what_to_do() -> None:
    code = (
        "import importlib.util, sys; find, gone = importlib.util.find_spec, set(sys.argv[1:])\n"
        "importlib.util.find_spec = lambda name, *a: None if name in gone else find(name, *a)\n"
        "class Gone:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in gone: raise ModuleNotFoundError('No module', name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "import truenorm; truenorm.BatchNormalization"
    )

    def said(*gone: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *gone], capture_output=True, text=True, check=False,
            env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        )  # fmt: skip
        return done.stderr.splitlines()[-1]

    problem = (
        "truenorm._errors.MissingDependencyError: Keras is to work on tensorflow, which is not "
        "installed (at 'KERAS_BACKEND'). Expected: "
    )
    assert said("tensorflow") == (
        f"{problem}jax, torch. Received: tensorflow. Remedy: set KERAS_BACKEND=jax before Keras is "
        "imported."
    )
    assert said("tensorflow", "jax", "torch") == (
        f"{problem}jax, tensorflow, torch. Received: tensorflow. Remedy: pip install "
        '"truenorm[jax]", or [tensorflow], or [torch]; then set KERAS_BACKEND.'
    )


SOURCES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "src" / "truenorm").rglob("*.py"))
}
EXAMPLES = [name for name, path in SOURCES.items() if ">>> " in path.read_text("utf-8")]


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_in_the_documentation_run(module: str) -> None:
    keras.utils.set_random_seed(0)
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0
    assert results.attempted > 0
