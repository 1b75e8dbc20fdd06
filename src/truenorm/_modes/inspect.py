"""The sites of a model, and what each does in every entry point, run for the purpose."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import keras
import numpy as np

from truenorm._checks import known_options
from truenorm._errors import (
    DataError,
    KerasVersionError,
    ModelError,
    in_one_line,
    is_out_of_memory,
)
from truenorm._keras_internals import STEPS, compile_arguments, is_compiled, layers_in
from truenorm._model.data import one_batch
from truenorm._model.graph import graph_of
from truenorm._model.probe import make_inputs
from truenorm._model.progress import Line, Wanted, shown
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import describe_spot, spots
from truenorm._model.snapshot import lasting, remember, same_randomness
from truenorm._model.trainer import variables_of
from truenorm._model.values import kept, numbers
from truenorm._modes.causes import surprises
from truenorm._modes.observe import watched
from truenorm._records.inspection import ENTRY_POINTS, Inspection
from truenorm._records.observation import Mode

_EAGER: tuple[str, ...] = {"tensorflow": ENTRY_POINTS, "jax": ("evaluate", "predict")}.get(
    keras.config.backend(), ()
)
"""Entry points that run uncompiled. A graph of TensorFlow would show what is traced, both branches
of a conditional for one, not what runs. On JAX the operations of these are those of ``model(x)``,
each of which is compiled for that already: a program of them would be compiled for one batch."""


@known_options
def inspect(model: Any, x: Any = None, y: Any = None, *, progress: Wanted = None) -> Inspection:
    """Every BatchNormalization of a model: where it is, and what it does in each entry point.

    ``fit``, ``evaluate``, ``predict``, ``model(x)`` and ``model(x, training=True)`` are run on one
    batch, and what each site did is recorded: the statistics that normalised, whether the moving
    statistics moved, whether gamma and beta learned. So a ``training=`` written into the model, a
    frozen layer, a frozen parent or a ``call`` that forgets ``training`` show by their effect, and
    where it is not the expected one, the cause is named.

    A functional or Sequential model is run as a disposable copy. One that cannot be copied (a
    subclassed one) is run itself, and everything of it is put back: weights, optimizer, metrics,
    compiled functions, flags, random state.

    An entry point that cannot be run (a training step of your own that wants other data, a loss
    that does not take the targets) is listed with the reason, and the others are run all the same.

    Args:
        model: Any built ``keras.Model``, nested ones included. It is unchanged afterwards.
        x: Inputs of one batch, or data in batches (a ``PyDataset``, ``tf.data``, a ``DataLoader``),
            of which the first is taken; made from the input specification where none are given. A
            subclassed model has no such specification.
        y: Targets. Where given, the model's own loss is used; else one made for the purpose.
        progress: Whether to show what is going on, on the standard error stream. None: on a
            terminal and in a notebook.

    Returns:
        The sites, their observed modes, and the causes of surprises; prints as tables.

    Raises:
        ModelError: The model is not built, has no BatchNormalization, or cannot be run at all.
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
    inputs = make_inputs(model) if x is None else one_batch(model, x)
    with shown(progress, "inspecting") as line, same_randomness(), _disposable(model) as copy:
        if y is not None and not is_compiled(copy):  # one with metrics of unknown class is not
            raise DataError(
                "Targets are given, but the model has no loss to use them with",
                where=model.name,
                remedy="compile the model first, or call inspect without y",
            )
        modes, not_run = _run_all(copy, inputs, y, line)
    sites = tuple(map(describe_spot, places))
    return Inspection(model.name, sites, modes, surprises(model, places, modes), not_run)


@contextmanager
def _disposable(model: Any) -> Generator[Any]:
    """A copy of the model; or the model itself, and everything of it put back afterwards."""
    try:
        copy = None if graph_of(model) is None else rebuild(model)
    except ModelError:
        copy = None
    if copy is not None:
        yield copy
        return
    restore = remember(layers_in(model), variables_of(model))
    try:
        for variable in variables_of(model):
            variable.assign(numbers(variable))  # JAX's fit gives arrays away: not what others hold
        # JAX would find the model's own programs again, which were traced without a look inside.
        model.__dict__.update({step: partial(getattr(model, step)) for step in STEPS.values()})
        yield model
    finally:
        restore()


def _run_all(
    model: Any, inputs: Any, y: Any, line: Line
) -> tuple[dict[str, tuple[Mode, ...]], dict[str, str]]:
    """The modes of every site in each entry point; and why an entry point could not be run."""
    places = spots(model)
    size = len(keras.tree.flatten(inputs)[0])
    prepare = cache(partial(_prepare, model, inputs, y))
    runs: tuple[Callable[[Any], Any], ...] = (
        lambda targets: model.fit(inputs, targets, batch_size=size, shuffle=False, verbose=0),
        lambda targets: model.evaluate(inputs, targets, batch_size=size, verbose=0),
        lambda _: model.predict(inputs, batch_size=size, verbose=0),
        lambda _: model(inputs),
        lambda _: model(inputs, training=True),
    )
    modes: dict[str, tuple[Mode, ...]] = {}
    not_run: dict[str, str] = {}
    saved = [kept(variable) for variable in model.variables]
    for entry, run in zip(ENTRY_POINTS, runs, strict=True):
        line.step(f"running {entry}")
        try:
            targets = prepare() if entry in ("fit", "evaluate") else None
            model.run_eagerly = entry in _EAGER
            with watched(model, places) as watch, lasting(variables_of(model)):
                run(targets)
            modes[entry] = watch.modes()
        except KerasVersionError:
            raise
        except Exception as error:  # a step, a loss or a call of the user's own may do anything
            if is_out_of_memory(error):
                raise  # TensorFlow waits for memory ten seconds at every attempt
            not_run[entry] = in_one_line(error)
        for restore in saved:
            restore()
    if not modes:
        raise ModelError(
            "The model could not be run in any way",
            where=model.name,
            received="; ".join(f"{entry}: {why}" for entry, why in not_run.items()),
            remedy="give inspect data that the model takes: inspect(model, x, y)",
        )
    return modes, not_run


def _prepare(model: Any, inputs: Any, y: Any) -> Any:
    """Make the model ready for fit and evaluate, and give its targets."""
    arguments = compile_arguments(model)
    if y is None or arguments is None:
        generator = np.random.default_rng(1)
        made = model(inputs, training=False)
        targets = keras.tree.map_structure(
            lambda t: generator.normal(size=tuple(t.shape)).astype("float32"), made
        )
        losses = keras.tree.map_structure(lambda _: "mean_squared_error", made)
    else:
        targets, losses = y, arguments["loss"]
    # None would leave those of an earlier compile, which may not take these targets; none at all is
    # what a train_step with metrics of its own may count on: it need not update others.
    earlier = any(metric.name == "compile_metrics" for metric in model.metrics)
    keras.Model.compile(
        model,
        keras.optimizers.SGD(1e-2),
        losses,
        metrics=[] if earlier else None,
        auto_scale_loss=False,  # under mixed_float16 it would skip the one step that is looked at
        run_eagerly="fit" in _EAGER,
    )
    model.optimizer.build(model.trainable_variables)
    return targets
