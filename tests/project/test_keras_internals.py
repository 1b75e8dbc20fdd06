"""Names that Keras does not promise: each taken away, and what users of the tools then see."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import truenorm as tn
from truenorm import _keras_internals as internals
from truenorm import archive

BACKEND = keras.config.backend()
X, Y = np.random.default_rng(0).normal(size=(8, 3)).astype("float32"), np.ones((8, 1), "float32")


class Renamed:
    """In an attribute's place: Keras, which knows the new name, finds it, and truenorm does not."""

    def __init__(self, owner: type, name: str) -> None:
        self.name, self.original = name, getattr(owner, name, None)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        modules = getattr(instance, "__dict__", {}).get("_modules", {})
        if self.name in modules:  # torch would find it there
            vars(instance)[self.name] = modules.pop(self.name)
        if sys._getframe(1).f_globals["__name__"].startswith("truenorm"):
            raise AttributeError(self.name)
        if instance is None:
            return self.original
        if self.name in vars(instance):
            return vars(instance)[self.name]
        bind = getattr(self.original, "__get__", None)
        return self.original if bind is None else bind(instance, owner)

    def __set__(self, instance: Any, value: Any) -> None:
        if isinstance(self.original, property):
            self.original.__set__(instance, value)
        else:
            vars(instance)[self.name] = value


# --- the tools as users call them ---------------------------------------------------------------


def freeze(model: Any) -> None:
    tn.freeze(model).undo()


def replace(model: Any) -> None:
    tn.replace(model, to="truenorm")


def observe(model: Any) -> None:
    with tn.observe(model):
        model.fit(X, Y, verbose=0)


def diagnose_decay(model: Any) -> None:
    model.compile(keras.optimizers.AdamW(weight_decay=0.1), "mse")
    tn.diagnose(model, select="TN204")


def freeze_averages(model: Any) -> None:
    model.compile(keras.optimizers.SGD(use_ema=True), "mse")
    model.fit(X, Y, verbose=0)
    freeze(model)


def freeze_scaled(model: Any) -> None:
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    model.fit(X, Y, verbose=0)
    freeze(model)


def changed_after_compile(model: Any) -> None:
    model.get_layer("bn").trainable = False
    tn.diagnose(model, select="TN402")


def load(model: Any, path: Path) -> None:
    archive.save(model, path)
    archive.load(path)


def train(model: Any) -> None:
    tn.replace(model, to="truenorm").model.fit(X, Y, verbose=0)


def train_a_domain(model: Any) -> None:
    del model
    tn.BatchNormalization(domains=2)(X, training=True, domain=0)


def train_masked_in_other_dtype(model: Any) -> None:
    del model
    masked = keras.layers.Masking()(np.ones((2, 3, 4), "float32"))
    tn.BatchNormalization(dtype="float16")(masked, training=True)


# --- what is taken away -------------------------------------------------------------------------


def rename(owner: str, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The attribute of a class, whether the class has it or its instances."""

    def take_away(monkeypatch: pytest.MonkeyPatch) -> None:
        module, _, kind = owner.rpartition(".")
        found = getattr(sys.modules[module], kind)
        monkeypatch.setattr(found, name, Renamed(found, name), raising=False)

    return take_away


def drop(module: str, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """What a module holds."""
    return lambda monkeypatch: monkeypatch.delattr(sys.modules[module], name)


def change(owner: type, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """The name stays, and does something else."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


@dataclass(frozen=True)
class Case:
    """What is missing, by which name it is reported, and the tool that needs it."""

    take_away: Callable[[pytest.MonkeyPatch], None]
    name: str
    purpose: str
    tool: Callable[..., Any]
    backends: tuple[str, ...] = field(default=("jax", "tensorflow", "torch"))

    def __str__(self) -> str:
        return self.name


def other_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).call(self, *args, **kwargs)


def other_training(self: Any, x: Any, training: bool = False, mask: Any = None) -> Any:  # noqa: ARG001
    """Without ``_moments``."""
    return x


def unforced(self: Any) -> Any:
    return self.train_function


def obstinate(self: Any, force: bool = False) -> Any:  # noqa: ARG001
    return self.train_function


LAYER, MODEL = "keras.layers.Layer", "keras.Model"
FUNCTIONAL = "keras.src.models.functional.Functional"
OPTIMIZER = "keras.optimizers.Optimizer"
NODE = "keras.src.ops.node.Node"
GRAPH, AGAIN = "read a model's graph", "make a model's compiled functions again"
COMPILED = "see with what a model was compiled"
CASES = (
    Case(drop("keras.src.models.functional", "Functional"), FUNCTIONAL, GRAPH, tn.fold),
    Case(rename("keras.Sequential", "_functional"), "Sequential._functional",
         "read a Sequential model's graph", replace),
    Case(rename(FUNCTIONAL, "_nodes_by_depth"), "Functional._nodes_by_depth", GRAPH, tn.inspect),
    Case(rename(NODE, "input_tensors"), "Node.input_tensors", GRAPH, tn.inspect),
    Case(rename(NODE, "arguments"), "Node.arguments", GRAPH, tn.fold),
    Case(rename(NODE, "is_input"), "Node.is_input", GRAPH, replace),
    Case(rename(FUNCTIONAL, "_run_through_graph"), "Functional._run_through_graph",
         "make a model again with other layers", replace),
    Case(rename("keras.KerasTensor", "_keras_history"), "KerasTensor._keras_history",
         "tell which operation made a tensor", replace),
    Case(rename(LAYER, "_flatten_layers"), "Functional._flatten_layers",
         "find the layers of a model", freeze),
    Case(rename(MODEL, "compiled"), "Functional.compiled", "see whether a model is compiled",
         changed_after_compile),
    Case(rename(MODEL, "_compile_config"), "Functional._compile_config", COMPILED, replace),
    Case(rename(MODEL, "_compile_config"), "Functional._compile_config", COMPILED, observe),
    Case(rename("keras.src.saving.serialization_lib.SerializableDict", "config"),
         "SerializableDict.config", "save a copy of a layer", replace),
    Case(rename(MODEL, "_compiled_trainable_state"), "Functional._compiled_trainable_state",
         "see what changed since a model's compile", changed_after_compile),
    Case(rename(MODEL, "_compiled_trainable_state"), "Functional._compiled_trainable_state",
         "see what changed since a model's compile", observe),
    Case(rename(MODEL, "train_function"), "Functional.train_function", AGAIN, freeze),
    Case(rename(MODEL, "predict_function"), "Functional.predict_function", AGAIN, observe),
    Case(rename(MODEL, "make_train_function"), "Functional.make_train_function", AGAIN, freeze),
    Case(change(keras.Model, "make_train_function", unforced),
         "Functional.make_train_function(force)", AGAIN, freeze),
    Case(change(keras.Model, "make_train_function", obstinate),
         "a Functional.make_train_function(force=True) that obeys", AGAIN, freeze),
    Case(rename(OPTIMIZER, "built"), "SGD.built", "see whether an optimizer has its variables",
         freeze),
    Case(rename("keras.optimizers.LossScaleOptimizer", "inner_optimizer"),
         "LossScaleOptimizer.inner_optimizer", "reach the optimizer behind the loss scaling",
         freeze_scaled),
    Case(rename(OPTIMIZER, "_trainable_variables"), "SGD._trainable_variables",
         "see what an optimizer updates", freeze),
    Case(rename(OPTIMIZER, "_model_variables_moving_average"),
         "SGD._model_variables_moving_average", "start averages of weights at the weights",
         freeze_averages),
    Case(rename(OPTIMIZER, "_learning_rate"), "SGD._learning_rate",
         "make an optimizer again with its schedule", freeze),
    Case(rename(OPTIMIZER, "_distribution_strategy"), "SGD._distribution_strategy",
         "make an optimizer again under its strategy", freeze, ("tensorflow",)),
    Case(rename(OPTIMIZER, "_use_weight_decay"), "AdamW._use_weight_decay",
         "tell which variables decay", diagnose_decay),
    Case(drop("keras.src.backend.common.symbolic_scope", "in_symbolic_scope"),
         "keras.src.backend.common.symbolic_scope.in_symbolic_scope",
         "tell calls from the search for shapes", tn.inspect),
    Case(drop("keras.src.backend.common.stateless_scope", "in_stateless_scope"),
         "keras.src.backend.common.stateless_scope.in_stateless_scope",
         "leave variables alone in a stateless scope", train, ("torch",)),
    Case(drop("keras.src.backend.common.masking", "get_keras_mask"),
         "keras.src.backend.common.masking.get_keras_mask",
         "tell which values of an input count", train_a_domain),
    Case(drop("keras.src.backend.common.masking", "set_keras_mask"),
         "keras.src.backend.common.masking.set_keras_mask",
         "keep the mask of an input that is converted", train_masked_in_other_dtype),
    Case(drop("keras.src.saving.serialization_lib", "in_safe_mode"),
         "keras.src.saving.serialization_lib.in_safe_mode",
         "see whether loading files is safe here", load),
    Case(rename("keras.layers.BatchNormalization", "_moments"), "BatchNormalization._moments",
         "see which statistics a layer used", tn.inspect),
    Case(change(keras.layers.BatchNormalization, "call", other_training),
         "a use of BatchNormalization._moments in training mode only",
         "see which statistics a layer used", observe),
    Case(change(keras.Operation, "__call__", other_call),
         "the look-up of Layer.call on the instance", "watch what layers do", observe),
)  # fmt: skip


@pytest.fixture
def model() -> Iterator[Any]:
    """A model that was fitted before Keras changed under it."""
    inputs = keras.Input((3,))
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="inner")
    x = keras.layers.BatchNormalization(name="bn")(keras.layers.Dense(4)(inputs))
    made = keras.Model(inputs, keras.layers.Dense(1)(inner(keras.layers.ReLU()(x))))
    made.compile("sgd", "mse", run_eagerly=True)
    made.fit(X, Y, verbose=0)
    found_once = [one for one in vars(internals).values() if hasattr(one, "cache_clear")]
    found_once = [one.cache_clear for one in found_once] + [internals._FOUND.clear]
    for forget in found_once:
        forget()
    yield made
    for forget in found_once:
        forget()


@pytest.mark.parametrize("case", [c for c in CASES if BACKEND in c.backends], ids=str)
def test_a_name_that_is_gone_is_named_with_what_does_not_work(
    case: Case, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = [tmp_path / "model.keras"] if case.tool is load else []
    with monkeypatch.context() as patch:
        case.take_away(patch)
        with pytest.raises(tn.KerasVersionError) as raised:
            case.tool(model, *arguments)
    lacks = f"This version of Keras lacks {case.name}, which truenorm needs to {case.purpose}."
    assert lacks in str(raised.value)  # Keras tells of the call around it that failed
    assert f"Received: Keras {keras.__version__}. Remedy: install" in str(raised.value)


def test_no_other_module_knows_what_keras_does_not_promise() -> None:
    source = Path(tn.__file__).parent
    for path in {*source.rglob("*.py")} - {*source.glob("_kernels/**/*.py")}:
        if path != Path(internals.__file__):
            assert list(private_names(ast.parse(path.read_text("utf-8")))) == [], path


def private_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        own = isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and not own:
            if ast.unparse(node) == "os._exit":  # documented
                continue
            yield node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras.src"):
            yield node.module or ""
