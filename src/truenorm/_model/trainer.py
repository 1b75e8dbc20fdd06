"""What ``compile`` and ``fit`` keep on a model: compiled functions, flags, the configuration."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import keras

from truenorm._keras_internals import (
    STEPS,
    compilation,
    compile_arguments,
    compiled_functions,
    is_built,
    is_compiled,
    layers_in,
    make_function,
    trainable_when_compiled,
    updated_variables,
)
from truenorm._model.hooks import patched


def _compiled_for(model: Any) -> Any:
    """What the compiled functions of a model were made for."""
    optimizer = getattr(model, "optimizer", None)
    return (
        id(compilation(model)),
        [(id(one), one.trainable, getattr(one, "freeze", None)) for one in layers_in(model)],
        [*map(id, getattr(optimizer, "variables", ()))],
    )


def variables_of(model: Any) -> list[Any]:
    """The variables of a model, its metrics and its optimizer."""
    optimizer = getattr(model, "optimizer", None)
    of_metrics = [variable for metric in model.metrics for variable in metric.variables]
    return [*model.variables, *of_metrics, *getattr(optimizer, "variables", ())]


@contextmanager
def uncompiled(model: Any) -> Generator[None]:
    """The model, and each model in it, runs uncompiled; its compiled functions are kept.

    They are given back unless a ``compile`` or a ``freeze`` inside has made them out of date.
    """
    models = [one for one in layers_in(model) if isinstance(one, keras.Model)]
    flags = {one: (one.run_eagerly, one.jit_compile) for one in models}
    functions = {one: compiled_functions(one) for one in models}
    state = {one: _compiled_for(one) for one in models}

    def staying_uncompiled(one: Any, original: Any) -> Any:
        def compile_(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            flags[one] = one.run_eagerly, one.jit_compile
            one.run_eagerly, one.jit_compile = True, False

        return compile_

    with patched((one, "compile", staying_uncompiled(one, one.compile)) for one in models):
        try:
            for one in models:
                one.run_eagerly, one.jit_compile = True, False
                make_anew(one)  # fit may be running just now
            yield
        finally:
            for one in models:
                one.run_eagerly, one.jit_compile = flags[one]
                if _compiled_for(one) == state[one]:
                    one.__dict__.update(functions[one])  # past Keras's tracking
                else:
                    make_anew(one)


def make_anew(model: Any) -> None:
    """Make the functions that a model has compiled once more, for its state as it is now.

    ``jax.jit`` finds an old program again under an equal method for as long as anything refers to
    it; so the method is put into a wrapper that is equal to nothing else.
    """
    for name, function in compiled_functions(model).items():
        if function is not None:
            step = STEPS[name]
            with patched([(model, step, partial(getattr(model, step)))]):
                make_function(model, name)


def changed_after_compile(model: Any) -> dict[Any, bool]:
    """The layers whose ``trainable`` is not what it was at ``compile``, and what it was."""
    compiled = trainable_when_compiled(model)
    return {layer: was for layer, was in compiled.items() if layer.trainable != was}


FitAfterChange = Literal["obeys", "goes on as compiled", "raises an error"]


def fit_after_change(model: Any, *, compiled: bool = True) -> FitAfterChange:
    """What Keras's ``fit`` does with a ``trainable`` that was changed after ``compile``.

    Measured; a test holds each case on each backend. Before the first step nothing has been
    compiled and the optimizer has no variables: all three backends obey. After it, TensorFlow goes
    on with the step that it has; JAX compares the number of variables with its optimizer's, and
    goes on where they are equal; PyTorch compiles nothing, but its optimizer refuses variables that
    it does not know.

    Args:
        model: A compiled model with such a change.
        compiled: Whether ``fit`` runs compiled, as it does by default.
    """
    if compiled_functions(model)["train_function"] is None or not has_optimizer(model):
        return "obeys"
    known, wanted = updated_variables(model.optimizer), model.trainable_variables
    backend = keras.config.backend()
    if backend == "jax" and len(known) != len(wanted):
        return "raises an error"
    if backend != "torch" and compiled:
        return "goes on as compiled"
    unknown = {*map(id, wanted)} - {*map(id, known)}
    return "raises an error" if unknown else "obeys"


def has_optimizer(model: Any) -> bool:
    """Whether the model has an optimizer that has its variables."""
    return is_compiled(model) and model.optimizer is not None and is_built(model.optimizer)


def compile_like(old: Any, new: Any) -> None:
    """Compile as the old model is; live losses are shared, since they have no state."""
    config = compile_arguments(old)
    if config is None:
        return

    def anew(item: Any) -> Any:
        stateful = isinstance(item, keras.optimizers.Optimizer | keras.metrics.Metric)
        return type(item).from_config(item.get_config()) if stateful else item

    try:
        fresh = {key: keras.tree.map_structure(anew, value) for key, value in config.items()}
    except (TypeError, ValueError):  # a metric of a class or function that Keras does not know
        return
    compile_: Any = keras.Model.compile  # a class's own may take other arguments
    compile_(new, **fresh)


def compile_without_state(model: Any) -> None:
    """Compile anew, with an optimizer that has no state: it is in no file, and Keras misses none.

    (Built, since a file of a model whose optimizer is not makes Keras warn when it is loaded.)
    """
    config = compile_arguments(model)
    if config is not None:
        compile_: Any = keras.Model.compile
        compile_(model, **{**config, "optimizer": "sgd", "auto_scale_loss": False})
        model.optimizer.build(model.trainable_variables)
