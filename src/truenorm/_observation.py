"""What every BatchNormalization really did: observed in each entry point, not inferred from flags.

The entry points are run on a disposable copy of the model. Three facts are recorded per site, each
in its own way: which statistics normalised (which of the layer's own methods ran), whether the
moving statistics changed and whether gamma or beta changed (their values before and after).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from truenorm._data import check
from truenorm._errors import DataError
from truenorm._graph import Call
from truenorm._interception import intercepted, noted
from truenorm._probe import make_inputs
from truenorm._rebuilding import numbers, rebuild, same_randomness
from truenorm._records.sites import Inspection, Mode
from truenorm._sites import describe, site_calls

BATCH_METHODS = ("_normalize_batch", "_moments")
"""Methods that a layer calls exactly when the batch's statistics normalise: ours, Keras's."""


def inspect(model: Any, x: Any = None, y: Any = None) -> Inspection:
    """Every BatchNormalization of a model: where it is, and what it does in each entry point.

    ``fit``, ``evaluate``, ``predict``, ``model(x)`` and ``model(x, training=True)`` are run on one
    batch with a copy of the model, and what each site did is recorded: the statistics that
    normalised, whether the moving statistics moved, whether gamma and beta learned. So a
    ``training=`` written into the model, a frozen layer or a frozen parent show by their effect.

    Args:
        model: A functional or built Sequential ``keras.Model``, nested ones included. It is not
            changed: neither its weights nor its optimizer, metrics or compiled functions.
        x: Inputs of one batch; made from the input specification where none are given.
        y: Targets. Where given, the model's own loss is used; else one made for the purpose.

    Returns:
        The sites and their observed modes; prints as two tables.

    Raises:
        ModelError: The model is subclassed, not built, or has no BatchNormalization.
        DataError: ``x`` does not fit the model; or ``y`` is given for a model without a loss.

    Example:
        >>> import keras, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((4,)), layer])
        >>> modes = tn.inspect(model).modes
        >>> modes["fit"][0].describe(), modes["predict"][0].describe()
        ('batch + updates + learns', 'moving')
    """
    sites, hidden = site_calls(model)
    inputs = make_inputs(model) if x is None else x
    check(model, inputs)
    with same_randomness():
        modes = _run_all(model, inputs, y)
    described = tuple(describe(call) for call in sites)
    return Inspection(model.name, described, modes, tuple(hidden))


def _run_all(model: Any, inputs: Any, y: Any) -> dict[str, tuple[Mode, ...]]:
    """The modes of every site in each entry point, on a disposable copy."""
    copy = rebuild(model)
    copied, _ = site_calls(copy)
    targets = _compile(copy, inputs, y)
    saved = [(v, numbers(v)) for v in copy.variables]
    size = len(keras.tree.flatten(inputs)[0])
    runs: dict[str, Callable[[], Any]] = {
        "model(x)": lambda: copy(inputs),
        "model(x, training=True)": lambda: copy(inputs, training=True),
        "predict": lambda: copy.predict(inputs, batch_size=size, verbose=0),
        # Before fit: Keras builds the metrics at the first of the two with a call in inference
        # mode, which must not be counted as fit's own.
        "evaluate": lambda: copy.evaluate(inputs, targets, batch_size=size, verbose=0),
        "fit": lambda: copy.fit(inputs, targets, batch_size=size, shuffle=False, verbose=0),
    }
    modes: dict[str, tuple[Mode, ...]] = {}
    for entry, run in runs.items():
        with _watched(copied) as seen:
            run()
        modes[entry] = tuple(watch.mode() for watch in seen)
        for variable, value in saved:
            variable.assign(value)
    order = ("fit", "evaluate", "predict", "model(x)", "model(x, training=True)")
    return {entry: modes[entry] for entry in order}


def _compile(copy: Any, inputs: Any, y: Any) -> Any:
    """Make the copy ready for fit, and give its targets."""
    if y is not None:
        if not copy.compiled:  # nor is a copy of a model with metrics of an unknown class
            raise DataError(
                "Targets are given, but the model has no loss to use them with",
                where=copy.name,
                remedy="compile the model first, or call inspect without y",
            )
        targets = y
    else:
        generator = np.random.default_rng(1)
        made = copy(inputs, training=False)
        targets = keras.tree.map_structure(
            lambda t: generator.normal(size=tuple(t.shape)).astype("float32"), made
        )
        losses = keras.tree.map_structure(lambda _: "mean_squared_error", made)
        # No loss scaling: under mixed_float16 it would skip the one step that is looked at.
        copy.compile(keras.optimizers.SGD(1e-2), losses, auto_scale_loss=False)
    copy.optimizer.build(copy.trainable_variables)
    return targets


@dataclass
class _Watch:
    """What one layer did while watched."""

    layer: Any
    before: list[Any]
    calls: int = 0
    training: list[bool | None] = field(default_factory=list["bool | None"])
    used: list[str] = field(default_factory=list[str])

    def mode(self) -> Mode:
        after = _values(self.layer)
        changed = [a.tobytes() != b.tobytes() for a, b in zip(self.before, after, strict=True)]
        used = set(self.used)
        learnable = sum(w is not None for w in (self.layer.gamma, self.layer.beta))
        return Mode(
            calls=self.calls,
            training=tuple(dict.fromkeys(self.training)),
            statistics=("mixed" if len(used) > 1 else used.pop()) if used else None,
            updated=any(changed[learnable:]),
            learned=any(changed[:learnable]),
        )


@contextmanager
def _watched(sites: Sequence[Call]) -> Generator[list[_Watch]]:
    """Watch the layers of these sites while open; one watch per site, shared layers share one."""
    watch_of = {call.operation: _Watch(call.operation, _values(call.operation)) for call in sites}

    def handle(layer: Any, original: Any, inputs: Any, **arguments: Any) -> Any:
        watch = watch_of[layer]
        batch: list[str] = []
        with noted(layer, BATCH_METHODS, lambda: batch.append("batch")):
            outputs = original(inputs, **arguments)
        watch.calls += 1
        watch.training.append(arguments.get("training"))
        watch.used.append("batch" if batch else "moving")
        return outputs

    with intercepted(watch_of, handle):
        yield [watch_of[call.operation] for call in sites]


def _values(layer: Any) -> list[Any]:
    """Gamma and beta first, then the statistics: Keras's order of a layer's weights."""
    return [numbers(weight) for weight in layer.weights]
