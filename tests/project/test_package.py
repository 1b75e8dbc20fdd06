"""The package as users meet it: public names, light imports, errors, documentation examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from fresh_process import output_of

import truenorm as tn

ROOT = Path(__file__).parents[2]


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


@pytest.mark.long
def test_public_modules_need_no_import_of_their_own() -> None:
    shown = output_of(
        "import truenorm as tn; print(tn.archive.load.__name__, tn.callbacks.Recalibrate.__name__,"
        " tn.cluster.collect.__name__, tn.report.save.__name__); from truenorm import *;"
        " print(fold.__name__, archive.__name__)"
    )
    assert shown == "load Recalibrate collect save\nfold truenorm.archive"


@pytest.mark.any_backend
def test_what_scripts_import_of_truenorm_exists() -> None:
    missing: list[str] = []
    for folder in ("benchmarks", "examples", "tools", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                    continue
                if node.module.split(".")[0] == "truenorm":
                    wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                    missing += [f"{path.name}: {one}" for one in wanted if not _exists(one)]
    assert not missing


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or stands in one; none is imported."""
    folder = (ROOT / "src").joinpath(*name.split("."))
    if folder.is_dir() or folder.with_suffix(".py").is_file():
        return True
    module, _, attribute = name.rpartition(".")
    folder = (ROOT / "src").joinpath(*module.split("."))
    files = [folder.with_suffix(".py"), folder / "__init__.py", folder / "__init__.pyi"]
    texts = [file.read_text("utf-8") for file in files if file.is_file()]
    return any(re.search(rf"\b{attribute}\b", text) for text in texts)


def test_importing_truenorm_does_not_import_keras_or_a_framework() -> None:
    heavy = "{'keras', 'jax', 'torch', 'tensorflow', 'matplotlib', 'scipy', 'sklearn', 'typer'}"
    assert output_of(f"import sys, truenorm; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.long
def test_no_framework_beyond_kerass_own_is_imported() -> None:
    frameworks = "{'jax', 'torch', 'tensorflow'}"
    code = (
        f"import sys, keras; before = {frameworks} & set(sys.modules); import truenorm; "
        f"[getattr(truenorm, name) for name in truenorm.__all__]; "
        f"print(({frameworks} & set(sys.modules)) - before)"
    )
    assert output_of(code) == "set()"


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


class Finder(doctest.DocTestFinder):
    """Finds examples of functions inside decorators, too."""

    def _from_module(self, module: Any, object: Any) -> bool:  # noqa: A002 - its name there
        return super()._from_module(module, inspect.unwrap(object))


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_in_the_documentation_run(module: str) -> None:
    keras.utils.set_random_seed(0)
    loaded = importlib.import_module(module)
    runner = doctest.DocTestRunner()
    for example in Finder().find(loaded, module, globs=dict(vars(loaded))):
        runner.run(example)
    assert runner.failures == 0
    assert runner.tries > 0


def test_the_examples_of_every_tool_are_found() -> None:
    for name in ("collect", "inspect", "observe", "diagnose", "freeze", "fold", "place", "study"):
        tool = getattr(tn, name)
        module = importlib.import_module(tool.__module__)
        found = {one.name: one.examples for one in Finder().find(module, tool.__module__)}
        assert found[f"{tool.__module__}.{name}"]


# --- discovery -----------------------------------------------------------------------------------


def test_dir_and_the_docstring_are_an_overview_of_the_public_names() -> None:
    assert dir(tn) == sorted(tn.__all__)
    overview = tn.__doc__ or ""
    tools = {name for name in tn.__all__ if name.islower()}
    assert {name for name in tools if name not in overview} == set()


def test_help_is_an_overview_and_not_every_name_in_full() -> None:
    text = pydoc.plain(pydoc.render_doc(tn))
    assert all(line.strip() in text for line in (tn.__doc__ or "").splitlines()[2:])
    assert "CLASSES" not in text
    assert "FUNCTIONS" not in text
    assert len(text.splitlines()) < 80


def test_reports_cost_nothing_before_one_is_made() -> None:
    show = "print({'matplotlib', 'jinja2', 'keras'} & set(sys.modules))"
    assert output_of(f"import sys, truenorm as tn; dir(tn); {show}") == "set()"
    after = output_of(f"import sys, truenorm as tn; tn.report.save; {show}")
    assert after in ("set()", "{'jinja2'}")


MODEL = keras.Sequential(
    [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(name="bn_of_it")]
)


@pytest.mark.parametrize(
    ("call", "where", "remedy"),
    [
        (lambda x: tn.collect(MODEL, x, batchsize=2), "batchsize", "batch_size"),
        (lambda x: tn.collect(MODEL, x, upstream="populaton"), "upstream", "population"),
        (lambda x: tn.recalibrate(MODEL, x, upstrem="batch"), "upstrem", "upstream"),
        (lambda x: tn.adapt(MODEL, x, max_sample=3), "max_sample", "max_samples"),
        (lambda x: tn.callbacks.Recalibrate(x, batchsize=2), "batchsize", "batch_size"),
        (lambda x: tn.diagnose(MODEL, x, selct="TN1"), "selct", "select"),
        (lambda x: tn.inspect(MODEL, x, progres=False), "progres", "progress"),
        (lambda _: tn.observe(mdoel=MODEL), "mdoel", "model"),
        (lambda _: tn.freeze(MODEL, "statistic"), "freeze", "statistics"),
        (lambda _: tn.freeze(MODEL, layer="bn"), "layer", "layers"),
        (lambda _: tn.freeze(MODEL, layers="bn_of_itt"), "layers", "bn_of_it"),
        (lambda _: tn.unfreeze(MODEL, layer="bn"), "layer", "layers"),
        (lambda _: tn.place(MODEL, "befor_activation"), "position", "before_activation"),
        (lambda _: tn.place(MODEL, "none", inserts=True), "inserts", "insert"),
        (lambda _: tn.replace(MODEL, to="kears"), "to", "keras"),
        (lambda _: tn.fold(MODEL, wher="bn"), "wher", "where"),
        (lambda _: tn.study("mlp", "wine", epoch=3), "epoch", "epochs"),
        (lambda _: tn.study("mlp", "wine", epochs=3, backend="trch"), "backend", "torch"),
        (lambda _: tn.archive.load("m.keras", max_parameter=3), "max_parameter", "max_parameters"),
        (lambda _: tn.BatchNormalization(momentm=0.9), "momentm", "momentum"),
        (lambda _: tn.BatchNormalization(activation="rleu"), "activation", "relu"),
        (lambda _: tn.BatchNormalization(gamma_initializer="onse"), "gamma_initializer", "ones"),
        (lambda _: tn.Variant(learnin_rate=1e-3), "learnin_rate", "learning_rate"),
    ],
)  # fmt: skip
def test_a_misspelt_option_is_answered_with_the_right_one(
    call: Any, where: str, remedy: str
) -> None:
    with pytest.raises(tn.OptionError) as refused:
        call(np.ones((4, 4), "float32"))
    assert refused.value.where == where
    assert refused.value.remedy == f"write {remedy}"


def test_a_misspelt_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(AttributeError, match=r"'diagnos'\. Remedy: write diagnose\.$"):
        getattr(tn, "diagnos")  # noqa: B009
    with pytest.raises(AttributeError, match=r"^truenorm has no attribute 'xyzzy'\.$"):
        getattr(tn, "xyzzy")  # noqa: B009


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda _: tn.BatchNormalization(axis="a"), "The axis of BatchNormalization is a number"),
        (lambda x: tn.BatchNormalization(axis=7)(x), "does not have this axis"),
        (lambda _: tn.BatchNormalization(epsilon="a"), "Expected: a number of 0 or more"),
        (lambda _: tn.Variant(momentum="a"), "A variant has an impossible setting"),
        (lambda _: tn.place(MODEL, ["none"]), "There is no such position"),
        (lambda _: tn.replace(MODEL, ["keras"]), "There is no such layer to replace by"),
        (lambda _: tn.freeze(MODEL, layers=3), "No BatchNormalization of the model is meant"),
        (lambda x: tn.diagnose(MODEL, x, select=3), "No rule has a code that begins so"),
        (lambda x: tn.collect(MODEL, x.astype(str)), "The data is not numbers"),
        (lambda x: tn.diagnose(MODEL, x.astype(object)), "The data is not numbers"),
        (lambda x: tn.collect(MODEL, x, shard="yes"), "Whether processes share the data"),
        (lambda x: tn.study(lambda: MODEL, ((x, x), (x, x)), epochs=1, margin="a"), "margin"),
        (lambda x: tn.study(lambda: MODEL, ((x, x), (x, x)), epochs=1, threshold="a"), "threshold"),
        (lambda x: tn.study(lambda: MODEL, ((x, x), (x, x)), epochs=1, runner=3), "runner"),
        (lambda _: tn.archive.save(None, "m.keras"), "This is not a Keras model"),
    ],
)
def test_a_users_mistake_is_no_error_of_a_framework(call: Any, problem: str) -> None:
    with pytest.raises(tn.TruenormError) as refused:
        call(np.ones((4, 4), "float32"))
    assert problem in str(refused.value)


def test_the_layer_takes_what_keras_takes() -> None:
    assert tn.BatchNormalization(name="n", dtype="float32", autocast=False).name == "n"
    with pytest.raises(ValueError, match="nonsense"):
        tn.BatchNormalization(nonsense=3)
