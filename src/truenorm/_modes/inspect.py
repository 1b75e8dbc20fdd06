"""The sites of a model, and what each does in every entry point, run for the purpose."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np

from truenorm._errors import DataError, ModelError
from truenorm._keras_internals import STEPS, compile_arguments, layers_in
from truenorm._model.data import check
from truenorm._model.graph import graph_of
from truenorm._model.probe import make_inputs
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import describe_spot, spots
from truenorm._model.snapshot import remember, same_randomness
from truenorm._model.values import numbers
from truenorm._modes.causes import surprises
from truenorm._modes.observe import watched
from truenorm._records.inspection import Inspection
from truenorm._records.observation import Mode


def inspect(model: Any, x: Any = None, y: Any = None) -> Inspection:
    """Every BatchNormalization of a model: where it is, and what it does in each entry point.

    ``fit``, ``evaluate``, ``predict``, ``model(x)`` and ``model(x, training=True)`` are run on one
    batch, and what each site did is recorded: the statistics that normalised, whether the moving
    statistics moved, whether gamma and beta learned. So a ``training=`` written into the model, a
    frozen layer, a frozen parent or a ``call`` that forgets ``training`` show by their effect, and
    where it is not the expected one, the cause is named.

    A functional or Sequential model is run as a disposable copy. One that cannot be copied (a
    subclassed one) is run itself, and everything of it is put back: weights, optimizer, metrics,
    compiled functions, flags, random state.

    Args:
        model: Any built ``keras.Model``, nested ones included. It is unchanged afterwards.
        x: Inputs of one batch; made from the input specification where none are given. A
            subclassed model has no such specification.
        y: Targets. Where given, the model's own loss is used; else one made for the purpose.

    Returns:
        The sites, their observed modes, and the causes of surprises; prints as tables.

    Raises:
        ModelError: The model is not built, or has no BatchNormalization.
        DataError: ``x`` does not fit the model, or is missing for a subclassed one; or ``y`` is
            given for a model without a loss.

    Example:
        >>> import keras, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((4,)), layer])
        >>> modes = tn.inspect(model).modes
        >>> modes["fit"][0].describe(), modes["predict"][0].describe()
        ('batch + updates + learns', 'moving')
    """
    places = spots(model)
    if x is None and graph_of(model) is None:
        raise DataError(
            "A subclassed model does not say what its inputs are",
            where=model.name,
            remedy="give inspect a batch: inspect(model, x)",
        )
    inputs = make_inputs(model) if x is None else x
    check(model, inputs)
    with same_randomness(), _disposable(model) as copy:
        modes = _run_all(copy, inputs, y)
    sites = tuple(map(describe_spot, places))
    return Inspection(model.name, sites, modes, surprises(model, places, modes))


@contextmanager
def _disposable(model: Any) -> Generator[Any]:
    """A copy of the model; or the model itself, and everything of it put back afterwards."""
    try:
        copy = rebuild(model)
    except ModelError:
        copy = None
    if copy is not None:
        yield copy
        return
    metrics = [variable for metric in model.metrics for variable in metric.variables]
    restore = remember(layers_in(model), [*model.variables, *metrics])
    try:
        for variable in (*model.variables, *metrics):
            variable.assign(numbers(variable))  # JAX's fit gives arrays away: not what others hold
        # JAX would find the model's own programs again, which were traced without a look inside.
        model.__dict__.update({step: partial(getattr(model, step)) for step in STEPS.values()})
        yield model
    finally:
        restore()


def _run_all(model: Any, inputs: Any, y: Any) -> dict[str, tuple[Mode, ...]]:
    """The modes of every site in each entry point."""
    places = spots(model)
    targets = _compile(model, inputs, y)
    saved = [(v, numbers(v)) for v in model.variables]
    size = len(keras.tree.flatten(inputs)[0])
    runs: dict[str, Callable[[], Any]] = {
        "fit": lambda: model.fit(inputs, targets, batch_size=size, shuffle=False, verbose=0),
        "evaluate": lambda: model.evaluate(inputs, targets, batch_size=size, verbose=0),
        "predict": lambda: model.predict(inputs, batch_size=size, verbose=0),
        "model(x)": lambda: model(inputs),
        "model(x, training=True)": lambda: model(inputs, training=True),
    }
    modes: dict[str, tuple[Mode, ...]] = {}
    for entry, run in runs.items():
        with watched(model, places) as result:
            run()
            modes[entry] = result()
        for variable, value in saved:
            variable.assign(value)
    return modes


def _compile(model: Any, inputs: Any, y: Any) -> Any:
    """Make the model ready for fit, and give its targets."""
    arguments = compile_arguments(model)
    if y is not None and arguments is None:  # nor is a copy of one with metrics of unknown class
        raise DataError(
            "Targets are given, but the model has no loss to use them with",
            where=model.name,
            remedy="compile the model first, or call inspect without y",
        )
    if y is None or arguments is None:
        generator = np.random.default_rng(1)
        made = model(inputs, training=False)
        targets = keras.tree.map_structure(
            lambda t: generator.normal(size=tuple(t.shape)).astype("float32"), made
        )
        losses = keras.tree.map_structure(lambda _: "mean_squared_error", made)
    else:
        targets, losses = y, arguments["loss"]
    # No loss scaling: under mixed_float16 it would skip the one step that is looked at.
    keras.Model.compile(model, keras.optimizers.SGD(1e-2), losses, auto_scale_loss=False)
    model.optimizer.build(model.trainable_variables)
    return targets
