"""What ``compile`` and ``fit`` keep on a model: compiled functions, flags, the configuration."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras

from truenorm._keras_internals import (
    EAGER,
    compilation,
    compile_arguments,
    eager_flags,
    layers_in,
    trainable_when_compiled,
)
from truenorm._model.hooks import patched

STEPS = {
    "train_function": "train_step",
    "test_function": "test_step",
    "predict_function": "predict_step",
}
"""What a model compiles, and of which of its methods."""


def _set(model: Any, attributes: Mapping[str, Any]) -> None:
    """Past Keras's tracking."""
    model.__dict__.update(attributes)


def _compiled_for(model: Any) -> Any:
    """What the compiled functions of a model were made for."""
    optimizer = getattr(model, "optimizer", None)
    return (
        id(compilation(model)),
        [(id(one), one.trainable, getattr(one, "freeze", None)) for one in layers_in(model)],
        [*map(id, getattr(optimizer, "variables", ()))],
    )


@contextmanager
def uncompiled(model: Any) -> Generator[None]:
    """The model, and each model in it, runs uncompiled; its compiled functions are kept.

    They are given back unless a ``compile`` or a ``freeze`` inside has made them out of date.
    """
    models = [one for one in layers_in(model) if isinstance(one, keras.Model)]
    flags = {one: eager_flags(one) for one in models}
    functions = {one: {name: getattr(one, name, None) for name in STEPS} for one in models}
    state = {one: _compiled_for(one) for one in models}

    def staying_uncompiled(one: Any, original: Any) -> Any:
        def compile_(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            flags[one] = eager_flags(one)
            _set(one, EAGER)

        return compile_

    with patched((one, "compile", staying_uncompiled(one, one.compile)) for one in models):
        try:
            for one in models:
                _set(one, EAGER)
                make_anew(one)  # fit may be running just now
            yield
        finally:
            for one in models:
                _set(one, flags[one])
                if _compiled_for(one) == state[one]:
                    _set(one, functions[one])
                else:
                    make_anew(one)


def make_anew(model: Any) -> None:
    """Make the functions that a model has compiled once more, for its state as it is now.

    ``jax.jit`` finds an old program again under an equal method for as long as anything refers to
    it; so the method is put into a wrapper that is equal to nothing else.
    """
    for name, step in STEPS.items():
        if getattr(model, name, None) is not None:
            with patched([(model, step, partial(getattr(model, step)))]):
                getattr(model, f"make_{name}")(force=True)


def changed_after_compile(model: Any) -> list[Any]:
    """The layers whose ``trainable`` is not what it was when the model was compiled."""
    compiled = trainable_when_compiled(model)
    return [layer for layer, was in compiled.items() if layer.trainable != was]


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
