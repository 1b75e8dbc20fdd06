"""The one door to Keras's inside: every name without a public equivalent that truenorm relies on.

Each accessor says what the name is for. Where the installed Keras does not have it, the answer is
:class:`KerasVersionError`, which names that version and what does not work; never a silent wrong
answer. No other module uses a private name of Keras. (Private names of the frameworks are in
their kernels.)
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import keras

from truenorm._errors import KerasVersionError

_MISSING = object()


def _inside(owner: Any, name: str, purpose: str, parameters: tuple[str, ...] = ()) -> Any:
    """An attribute without a public equivalent; of a method, these parameters are needed."""
    value = getattr(owner, name, _MISSING)
    kind: type = owner if isinstance(owner, type) else type(owner)
    if value is _MISSING:
        raise _lacking(f"{kind.__name__}.{name}", purpose)
    if parameters and not _takes(getattr(value, "__func__", value), parameters):
        raise _lacking(f"{kind.__name__}.{name}({', '.join(parameters)})", purpose)
    return value


@cache
def _takes(function: Any, parameters: tuple[str, ...]) -> bool:
    return {*parameters} <= inspect.signature(function).parameters.keys()


_FOUND: dict[tuple[str, str], Any] = {}


def _member(module: str, name: str, purpose: str) -> Any:
    """A function or class of ``keras.src`` without a public name.

    Found once. (Not by ``functools.cache``, of which ``torch.compile`` warns.)
    """
    if (module, name) not in _FOUND:
        try:
            _FOUND[module, name] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise _lacking(f"{module}.{name}", purpose) from error
    return _FOUND[module, name]


def _lacking(name: str, purpose: str) -> KerasVersionError:
    return KerasVersionError(
        f"This version of Keras lacks {name}, which truenorm needs to {purpose}",
        expected="Keras 3.15.1, or a later version that truenorm knows",
        received=f"Keras {keras.__version__}",
        remedy="install a version of Keras that this truenorm supports, or a newer truenorm",
    )


# --- graphs ------------------------------------------------------------------------------------


def functional_class() -> Any:
    """The class of functional models."""
    return _member("keras.src.models.functional", "Functional", "read a model's graph")


def functional_twin(sequential: Any) -> Any | None:
    """The functional model inside a built Sequential; None if it has no input shape yet."""
    return _inside(sequential, "_functional", "read a Sequential model's graph")


def nodes(functional: Any) -> Iterator[Any]:
    """The nodes of a functional model in the order of execution, its inputs left out.

    A node has ``operation``, ``arguments``, ``input_tensors`` and ``outputs``.
    """
    purpose = "read a model's graph"
    by_depth: Mapping[int, list[Any]] = _inside(functional, "_nodes_by_depth", purpose)
    for depth in sorted(by_depth, reverse=True):
        for node in by_depth[depth]:
            for name in ("operation", "arguments", "input_tensors", "outputs", "is_input"):
                _inside(node, name, purpose)
            if node.operation is not None and not node.is_input:
                yield node


def run_through_graph(
    functional: Any, inputs: Any, operation_fn: Callable[[Any], Any], call_fn: Callable[..., Any]
) -> Any:
    """Run a functional model with other operations in the place of its own."""
    purpose, parameters = "make a model again with other layers", ("operation_fn", "call_fn")
    run = _inside(functional, "_run_through_graph", purpose, parameters)
    return run(inputs, operation_fn=operation_fn, call_fn=call_fn)


def filled_in(node: Any, tensors: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node's call with other tensors in the place of its own."""
    values = {id(old): new for old, new in zip(node.input_tensors, tensors, strict=True)}
    args, kwargs = _inside(node.arguments, "fill_in", "call a layer as a model does")(values)
    return args, dict(kwargs)


def operation_of(tensor: Any) -> Any:
    """The operation that made a symbolic tensor."""
    purpose = "tell which operation made a tensor"
    return _inside(_inside(tensor, "_keras_history", purpose), "operation", purpose)


def layers_in(layer: Any, *, itself: bool = True, nested: bool = True) -> list[Any]:
    """A layer and all layers in it, those of nested ones too."""
    purpose, parameters = "find the layers of a model", ("include_self", "recursive")
    flatten = _inside(layer, "_flatten_layers", purpose, parameters)
    return flatten(include_self=itself, recursive=nested)


# --- copies of layers --------------------------------------------------------------------------

_KEPT = (
    "_allow_non_tensor_positional_args", "_build_shapes_dict", "_called", "_call_context_args",
    "_call_has_context_arg", "_convert_input_args", "_dtype_policy", "_input_spec", "_parent_path",
    "_path", "_remat_mode", "_supports_masking", "_trainable", "activity_regularizer", "autocast",
    "built", "supports_jit",
)  # fmt: skip
"""What Keras keeps about a layer and a copy needs too; all else belongs to one object."""

_LEFT_BY_FIT = {
    "_compile_config", "_compiled_trainable_state", "_eval_epoch_iterator", "_jax_state", "history",
    "optimizer", "stop_evaluating", "stop_predicting", "stop_training",
}  # fmt: skip
_BOXES = ("_modules", "_parameters", "_buffers")
"""Where PyTorch's modules have the attributes of these kinds."""


def blank_like(layer: Any) -> Any:
    """An object of a layer's class that has nothing yet but what Keras keeps about every layer."""
    kind: Any = type(layer)
    new = kind.__new__(kind)
    base: Any = keras.Model if isinstance(layer, keras.Model) else keras.Layer
    base.__init__(new, name=layer.name)
    for name in _KEPT:
        setattr(new, name, _inside(layer, name, "copy a layer"))
    return new


def attributes(layer: Any, blank: Any) -> dict[str, Any]:
    """What a layer has that such a blank one lacks, without what ``compile`` and ``fit`` leave."""
    found = dict(vars(layer))
    for box in _BOXES:
        found |= found.pop(box, {})
    left = vars(blank).keys() | _LEFT_BY_FIT | {"_torch_params"}
    return {k: v for k, v in found.items() if k not in left and not k.startswith("_self_")}


def constructed_like(layer: Any, new: Any, counterpart: Callable[[Any], Any]) -> None:
    """Give a copy what the constructor was given, of which Keras makes a config."""
    given = _inside(layer, "_auto_config", "save a copy of a layer")
    if given is not None:
        config = _inside(given, "config", "save a copy of a layer")
        new.__dict__["_auto_config"] = type(given)(**counterpart(config))


def finish_like(layer: Any, new: Any, counterpart: Callable[[Any], Any]) -> None:
    """Make a copy own the counterparts of what a layer owns, in the same order."""
    theirs, ours = (_inside(one, "_tracker", "copy a layer") for one in (layer, new))
    for name, (_, items) in theirs.config.items():
        copies = [counterpart(item) for item in items]
        ours.config[name][1][:] = copies
        ours.stored_ids[name] = set(map(id, copies))
    if layer.built:
        _inside(new, "_post_build", "copy a layer")()
        _inside(new, "_lock_state", "copy a layer")()


def operation_like(operation: Any, attribute: Callable[[Any], Any] = lambda x: x) -> Any:
    """A copy of an operation that is not a layer, called nowhere yet."""
    kind: Any = type(operation)
    new = kind.__new__(kind)
    for name, value in vars(operation).items():
        new.__dict__[name] = [] if name.endswith("bound_nodes") else attribute(value)
    return new


def autocasts(variable: Any) -> bool:
    """Whether a variable is read in the dtype of the layer that computes with it."""
    return _inside(variable, "_autocast", "copy a variable")


# --- compile and fit ---------------------------------------------------------------------------


def is_compiled(model: Any) -> bool:
    """Whether ``compile`` was called."""
    return bool(_inside(model, "compiled", "see whether a model is compiled"))


def compile_arguments(model: Any) -> Mapping[str, Any] | None:
    """What a model was compiled with; None if it was not."""
    purpose = "compile a model as another one is"
    return _inside(compilation(model), "config", purpose) if is_compiled(model) else None


def compilation(model: Any) -> Any:
    """What changes with each ``compile``: compare by identity."""
    purpose = "see with what a model was compiled"
    return _inside(model, "_compile_config", purpose) if is_compiled(model) else None


def trainable_when_compiled(model: Any) -> dict[Any, bool]:
    """``trainable`` of every layer as it was at ``compile``: the model's own record of it."""
    if not is_compiled(model):
        return {}
    return _inside(model, "_compiled_trainable_state", "see what changed since a model's compile")


STEPS = {
    "train_function": "train_step",
    "test_function": "test_step",
    "predict_function": "predict_step",
}
"""The attributes that hold what a model has compiled, and of which of its methods."""

_RENEW = "make a model's compiled functions again"


def compiled_functions(model: Any) -> dict[str, Any]:
    """What a model holds as :data:`STEPS`; None where it was not used yet."""
    return {name: _inside(model, name, _RENEW) for name in STEPS}


def make_function(model: Any, name: str) -> None:
    """Make one of the :data:`STEPS` again."""
    old = _inside(model, name, _RENEW)
    _inside(model, f"make_{name}", _RENEW, ("force",))(force=True)
    if _inside(model, name, _RENEW) is old:
        raise _lacking(f"a {type(model).__name__}.make_{name}(force=True) that obeys", _RENEW)


# --- optimizers --------------------------------------------------------------------------------


def is_built(optimizer: Any) -> bool:
    """Whether an optimizer has its variables."""
    return bool(_inside(optimizer, "built", "see whether an optimizer has its variables"))


def inner_optimizer(optimizer: Any) -> Any | None:
    """The optimizer inside one that scales the loss; None in others."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return None
    return _inside(optimizer, "inner_optimizer", "reach the optimizer behind the loss scaling")


def updated_variables(optimizer: Any) -> list[Any]:
    """The variables that a built optimizer updates."""
    return _inside(optimizer, "_trainable_variables", "see what an optimizer updates")


def weight_averages(optimizer: Any) -> list[Any]:
    """The averages that an optimizer with ``use_ema`` keeps of them."""
    purpose = "start averages of weights at the weights"
    return _inside(optimizer, "_model_variables_moving_average", purpose)


LEARNING_RATE = "_learning_rate"


def learning_rate(optimizer: Any) -> Any:
    """The learning rate of an optimizer: a variable, or the schedule itself."""
    return _inside(optimizer, LEARNING_RATE, "make an optimizer again with its schedule")


def strategy_of(optimizer: Any) -> Any | None:
    """The strategy of ``tf.distribute`` that an optimizer was made under; None elsewhere."""
    if keras.config.backend() != "tensorflow":
        return None
    purpose = "make an optimizer again under its strategy"
    return _inside(optimizer, "_distribution_strategy", purpose)


def decays(optimizer: Any, variable: Any) -> bool:
    """Whether an optimizer with weight decay applies it to a variable."""
    decides = _inside(optimizer, "_use_weight_decay", "tell which variables decay")
    return bool(variable.trainable and decides(variable))


# --- scopes ------------------------------------------------------------------------------------


def in_symbolic_scope() -> bool:
    """Whether Keras looks for shapes only: nothing is computed."""
    module = "keras.src.backend.common.symbolic_scope"
    return _member(module, "in_symbolic_scope", "tell calls from the search for shapes")()


def in_stateless_scope() -> bool:
    """Whether assignments to variables are noted by a scope instead of made."""
    module = "keras.src.backend.common.stateless_scope"
    return _member(module, "in_stateless_scope", "leave variables alone in a stateless scope")()


def stateless_scope() -> Any:
    """The innermost stateless scope."""
    module = "keras.src.backend.common.stateless_scope"
    purpose = "run layers with statistics that are not theirs"
    return _member(module, "get_stateless_scope", purpose)()


def keras_mask(tensor: Any) -> Any | None:
    """The mask that Keras has put on a tensor; None if there is none."""
    purpose = "tell which values of an input count"
    return _member("keras.src.backend.common.masking", "get_keras_mask", purpose)(tensor)


def set_keras_mask(tensor: Any, mask: Any) -> None:
    """Put a mask on a tensor as Keras does."""
    purpose = "keep the mask of an input that is converted"
    _member("keras.src.backend.common.masking", "set_keras_mask", purpose)(tensor, mask)


def in_safe_mode() -> bool | None:
    """Whether loading is safe in this process; None if nobody has said anything."""
    module = "keras.src.saving.serialization_lib"
    return _member(module, "in_safe_mode", "see whether loading files is safe here")()


# --- the layer ---------------------------------------------------------------------------------


def hand_on_arguments(layer: Any) -> None:
    """Let a layer have its arguments as they are.

    A Keras without this switch converts them: those that the layer has converted stay the same.
    """
    layer._convert_input_args = False


@cache
def require_watchable() -> None:
    """Refuse a Keras whose layers cannot be watched, before anything runs.

    Such a Keras would fail in silence: where it does not run the ``call`` that is set on an
    instance, every layer would be "not called". So it is tried out once.
    """
    moments_method()
    in_symbolic_scope()
    layer, seen = keras.layers.Identity(name="probe"), list[Any]()
    layer.__dict__["call"] = lambda x: seen.append(x) or x
    layer(keras.ops.ones((1, 1)))
    if not seen:
        raise _lacking("the look-up of Layer.call on the instance", "watch what layers do")


@cache
def moments_method() -> str:
    """The method with which ``keras.layers.BatchNormalization`` takes a batch's statistics.

    Tried out once: it must be called exactly when the batch's statistics normalise.
    """
    name, purpose = "_moments", "see which statistics a layer used"
    original = _inside(keras.layers.BatchNormalization, name, purpose)
    layer, seen = keras.layers.BatchNormalization(name="probe"), list[bool]()
    layer.__dict__[name] = lambda *args: seen.append(training) or original(layer, *args)
    for training in (True, False):
        layer(keras.ops.ones((2, 1)), training=training)
    if seen != [True]:
        raise _lacking(f"a use of BatchNormalization.{name} in training mode only", purpose)
    return name


@cache
def activation_operations() -> frozenset[type]:
    """The classes of the operations that activation functions leave in a graph.

    Found out by calling the functions on a symbolic tensor: those that work on each number by
    itself. (``exp`` is left out: in a graph it is arithmetic as a rule.)
    """
    names = (
        "celu", "elu", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_tanh",
        "leaky_relu", "log_sigmoid", "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink",
        "softplus", "softsign", "sparse_plus", "sparse_sigmoid", "squareplus", "tanh",
        "tanh_shrink",
    )  # fmt: skip
    tensor = keras.KerasTensor((None, 1))
    outputs = [getattr(keras.ops, name)(tensor) for name in names]
    outputs += [keras.ops.threshold(tensor, 0.0, 0.0), keras.activations.relu(tensor)]
    return frozenset(type(operation_of(output)) for output in outputs)


@cache
def operation_classes() -> dict[str, type]:
    """The classes of some operations in a graph, by the names of the functions that make them."""
    x, short = keras.KerasTensor((None, 2, 3)), keras.KerasTensor((None, 1, 3))
    made = {
        "activations.relu": keras.activations.relu(x),
        "add": keras.ops.add(x, x),
        "average_pool": keras.ops.average_pool(x, 2),
        "concatenate": keras.ops.concatenate([x, x]),
        "divide": keras.ops.divide(x, x),
        "expand_dims": keras.ops.expand_dims(x, 1),
        "flip": keras.ops.flip(x, 1),
        "get_item": keras.ops.get_item(x, 0),
        "max": keras.ops.max(x, axis=1),
        "max_pool": keras.ops.max_pool(x, 2),
        "mean": keras.ops.mean(x, axis=1),
        "min": keras.ops.min(x, axis=1),
        "moveaxis": keras.ops.moveaxis(x, 1, 2),
        "multiply": keras.ops.multiply(x, x),
        "negative": keras.ops.negative(x),
        "relu": keras.ops.relu(x),
        "repeat": keras.ops.repeat(x, 2, axis=1),
        "reshape": keras.ops.reshape(x, (-1, 6)),
        "squeeze": keras.ops.squeeze(short, 1),
        "subtract": keras.ops.subtract(x, x),
        "sum": keras.ops.sum(x, axis=1),
        "swapaxes": keras.ops.swapaxes(x, 1, 2),
        "tile": keras.ops.tile(x, (1, 1, 2)),
        "transpose": keras.ops.transpose(x, (0, 2, 1)),
        "true_divide": keras.ops.true_divide(x, x),
    }
    return {name: type(operation_of(tensor)) for name, tensor in made.items()}


# --- TensorFlow beside another backend ---------------------------------------------------------


class _TensorFlowIfLoaded:
    """Stands for TensorFlow where Keras asks whether a value is of it, or gives it a seed."""

    @property
    def available(self) -> bool:
        """Whether there can be such values."""
        return "tensorflow" in sys.modules

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("tensorflow"), name)


def leave_tensorflow_unloaded() -> None:
    """From now on Keras saves models and sets seeds without loading TensorFlow, in this process.

    Keras loads it on every backend, where it is installed, and that takes seconds. What needs it,
    as ``TextVectorization`` does, loads it as before. A Keras that also loads it in other places is
    only slower: no version is refused for that.
    """
    for name in ("keras.src.utils.rng_utils", "keras.src.saving.serialization_lib"):
        module: Any = sys.modules.get(name)
        if hasattr(module, "tf"):
            module.tf = _TensorFlowIfLoaded()
