"""Swap every BatchNormalization of a model for ours, or for Keras's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal

import keras

from truenorm._checks import known_options, meant
from truenorm._errors import ModelError, OptionError
from truenorm._keras_internals import layers_in
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._model.edit import Edit, Piece, from_config
from truenorm._model.graph import Graph, graph_of, read_graph
from truenorm._model.progress import Wanted, shown
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import is_own_class, spots
from truenorm._model.trainer import has_optimizer
from truenorm._records.rewrite import Change, Left, Rewrite
from truenorm._rewrites.verify import Proof, verify

_OF_EVERY_LAYER = ("name", "trainable", "dtype")
_CLASSES: dict[str, Any] = {
    "truenorm": BatchNormalization,
    "keras": keras.layers.BatchNormalization,
}


@known_options
def replace(
    model: Any,
    to: Literal["truenorm", "keras"],
    *,
    probe: Any = None,
    progress: Wanted = None,
) -> Rewrite:
    """Swap every BatchNormalization for truenorm's or for Keras's, weights and outputs kept.

    The function of the model stays: outputs are compared on a probe before the new model is
    returned. The model given is not changed. Layers are found wherever a model holds them: inside
    wrappers, RNN cells, blocks and nested models of your own classes, in attributes, lists and
    dicts; the objects around them are copied with all that they hold. A layer with an option that
    Keras's does not have is left, with its reason in the receipt.

    Args:
        model: Any built ``keras.Model``, subclassed ones and nested ones included.
        to: ``"truenorm"`` or ``"keras"``: whose layer every site shall have.
        probe: Inputs to compare on; made from the input specification where none are given. What a
            subclassed model takes is not known: without a probe each layer is compared by itself.
        progress: Whether to show what is going on, on the standard error stream. None: on a
            terminal and in a notebook.

    Returns:
        The new model with its receipt. Layer names, weights, ``trainable`` flags (of single
        variables, too), dtype policies and the compile configuration are carried over; the
        optimizer starts anew. Weights are the same bit for bit, but under a 16-bit policy, where
        Keras's layer keeps its statistics in 16 bits. What a constructor of your own makes, it
        makes again as it is written when a file is loaded: notes say where that is.

    Raises:
        ModelError: The model is not built, has no BatchNormalization, or holds what cannot be
            copied.
        OptionError: ``to`` is something else.
        DataError: The model does not take ``probe``.
        VerificationError: The outputs would differ by more than rounding.

    Example:
        >>> import keras, truenorm as tn
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> rewrite = tn.replace(model, to="truenorm")
        >>> type(rewrite.model.layers[0]).__module__.split(".")[0], len(rewrite.changed)
        ('truenorm', 1)
    """
    if to not in list(_CLASSES):  # which may not be hashable
        raise OptionError(
            "There is no such layer to replace by",
            where="to",
            expected="'truenorm' or 'keras'",
            received=repr(to),
            remedy=meant(to, _CLASSES),
        )
    edit, changed, left = _plan(model, to)
    with shown(progress, "replacing") as line:
        line.step("making the new model")
        new = rebuild(model, edit)
        graph = Graph(model, ()) if graph_of(model) is None else read_graph(model)
        proof = verify(graph, edit, (), new, probe, "Replacing", line)
    proof = Proof(*proof[:3], notes=(*proof.notes, *_notes(model, edit)))
    return Rewrite(new, f"replace to {to}", changed, left, *proof)


def why_not_replaced(model: Any, to: str) -> dict[str, str]:
    """Path of every site that stays, and why: all of them, if the model cannot be copied."""
    edit, changed, left = _plan(model, to)
    try:
        rebuild(model, edit)
    except ModelError as error:
        left = (*left, *(Left(change.path, str(error)) for change in changed))
    return {site.path: site.reason for site in left}


def _plan(model: Any, to: str) -> tuple[Edit, tuple[Change, ...], tuple[Left, ...]]:
    edit: dict[Any, list[Piece]] = {}
    changed: list[Change] = []
    left: list[Left] = []
    for spot in spots(model):
        reason = _why_left(spot.layer, to)
        if reason is None:
            edit[spot.layer] = [Piece(from_config(spot.layer, _CLASSES[to]), spot.layer)]
            changed.append(Change(spot.path, f"now {to}'s BatchNormalization"))
        else:
            left.append(Left(spot.path, reason))
    return edit, tuple(changed), tuple(left)


def _why_left(layer: Any, to: str) -> str | None:
    if type(layer) is _CLASSES[to]:
        return f"it is {to}'s already"
    if is_own_class(layer):
        return f"its class {type(layer).__name__} is a custom subclass"
    option = _only_ours(layer) if to == "keras" else None
    return option and f"Keras's layer has nothing like its {option}"


def _notes(model: Any, edit: Edit) -> Iterator[str]:
    if edit and has_optimizer(model):
        yield (
            "The optimizer starts anew: what it has gathered of the old model (momentum, averages) "
            "is not carried over."
        )
    makers = [one for one in layers_in(model) if _makes_its_own(one, edit)]
    if makers:
        names = ", ".join(dict.fromkeys(type(one).__name__ for one in makers))
        yield (
            f"Layers inside {names} are made by a constructor: a file that is loaded has them as "
            "that one makes them. Change it there too, if the model is to be saved."
        )


def _makes_its_own(holder: Any, edit: Edit) -> bool:
    """Whether an edited layer is inside a layer of somebody's class, by no graph."""
    inside = layers_in(holder, itself=False)
    kerass = type(holder).__module__.partition(".")[0] == "keras"
    return not kerass and graph_of(holder) is None and any(layer in edit for layer in inside)


def _only_ours(layer: Any) -> str | None:
    """An option in use that Keras's layer does not have, on this backend; None if there is none."""
    known = inspect.signature(keras.layers.BatchNormalization).parameters
    for option, value in layer.get_config().items():
        if option not in known and option not in _OF_EVERY_LAYER:
            return option
        if option == "momentum" and value is None:
            return option
        if option == "synchronized" and value and keras.config.backend() != "tensorflow":
            return option
    return None
