"""The calls that mend: each can be made as it is printed, and none does harm.

A layer that normalises with its moving statistics in ``fit`` has taught the network to work with
just these: whoever replaces them by the population's destroys it. So a call that changes statistics
names the layers that learn from batches, unless these are all.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

import keras

from truenorm._diagnosis.averages import is_untouched
from truenorm._diagnosis.facts import Facts
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.sites import is_own_class

EXACT = 'model = tn.replace(model, to="truenorm").model'
"""Statistics without a loss of digits."""

ASK = "tn.diagnose(model, data, y)"
"""Where only the loss can tell what helps."""

_UNDO = "; and its undo(), if the model does worse"


def recalibrate(facts: Facts, options: str = "") -> str:
    """Statistics of the data for the layers that learn from batches; or who can tell if it helps.

    Statistics that never moved although the optimizer stepped are those of a network that was
    frozen while it learned, perhaps: without its loss nobody knows.
    """
    learning = [layer for layer in facts.layers if layer not in facts.held]
    doubtful = facts.steps > 0 and any(map(is_untouched, learning))
    certain = not (doubtful or facts.lacks("modes")) or (facts.data is not None and facts.scored)
    if not certain and not facts.labelled:
        return ASK
    call = _recalibrate(facts, learning, options)
    return call if certain else call + _UNDO


def recalibrate_alone(facts: Facts, layer: BatchNormalizationLike) -> str:
    """Statistics of the data for one layer, whose own are worth nothing; for all, if right."""
    if is_own_class(layer):
        return "set its moving statistics: tn.recalibrate does not know what its class does"
    everywhere = _recalibrate(facts, [*facts.layers])
    return everywhere if recalibrate(facts) == everywhere else _recalibrate(facts, [layer])


def recalibrate_after_dropout(facts: Facts, layer: BatchNormalizationLike) -> str:
    """Statistics of the data, also for a layer that is held: perhaps only since it was trained."""
    return _recalibrate(facts, [layer]) + _UNDO if layer in facts.held else recalibrate(facts)


def _recalibrate(facts: Facts, layers: Collection[Any], options: str = "") -> str:
    known = [layer for layer in layers if not is_own_class(layer)]
    if len(known) < len(facts.layers):
        options = f", layers={_selection(facts, known)}{options}"
    return f"tn.recalibrate(model, data{options})"


def hold(facts: Facts, layer: BatchNormalizationLike) -> str:
    """Statistics that stay as they are, in ``fit`` too."""
    path = facts.layers[layer]
    if isinstance(layer, BatchNormalization):
        return f'tn.freeze(model, "statistics", layers={path!r})'
    if is_replaced(facts, layer):
        return f'{EXACT}; tn.freeze(model, "statistics", layers={path!r})'
    return f"tn.freeze(model, layers={path!r})"


def is_replaced(facts: Facts, layer: BatchNormalizationLike) -> bool:
    """Whether ``tn.replace`` puts truenorm's layer in the place of this one."""
    return facts.layers[layer] not in facts.not_replaced


def remove(facts: Facts, path: str) -> str:
    """A site that goes: folded where that keeps the function, else left out."""
    if path not in facts.not_folded_alone:
        return f"model = tn.fold(model, where={path!r}).model"
    (site,) = (site for site in facts.sites if site.path == path)
    activation = getattr(site.operation, "activation", None)
    if activation is not None:
        return f"keras.layers.Activation({keras.activations.serialize(activation)!r}) in its place"
    return f'model = tn.place(model, "none", where={path!r}).model'


def apart(facts: Facts, layer: BatchNormalizationLike, calls: int) -> str:
    """One BatchNormalization for each use, where the uses can be told apart, or one domain."""
    around = facts.parents[layer]
    if any(isinstance(one, keras.layers.TimeDistributed) for one in around):
        return "keras.layers.BatchNormalization() on the whole sequence, without TimeDistributed"
    if any(isinstance(one, keras.layers.RNN) for one in around):
        return "keras.layers.LayerNormalization() in its place: a cell is called at each step"
    return (
        "keras.layers.BatchNormalization() for each use, or one "
        f"tn.BatchNormalization(domains={calls})"
    )


def _selection(facts: Facts, meant: Collection[Any]) -> str:
    """Some of the layers as the option ``layers`` takes them, in few words."""
    paths = [path for layer, path in facts.layers.items() if layer in meant]
    if len(paths) == 1:
        return repr(paths[0])
    start = paths[0] if paths else ""
    while "/" in start:
        start = start.rpartition("/")[0]
        pattern = f"{start}/*"
        if [p for p in facts.layers.values() if fnmatchcase(p, pattern)] == paths:
            return repr(pattern)
    if {layer for layer in facts.layers if layer.trainable} == {*meant}:
        return "lambda layer: layer.trainable"
    return repr(paths)
