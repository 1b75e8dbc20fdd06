"""Swap every BatchNormalization of a model for ours, or for Keras's own."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import keras

from truenorm._errors import OptionError
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._model.edit import Piece, from_config
from truenorm._model.graph import Call, read_graph
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import check_all, is_own_class
from truenorm._records.rewrite import Change, Left, Rewrite
from truenorm._rewrites.verify import verify

_OF_EVERY_LAYER = ("name", "trainable", "dtype")
_CLASSES: dict[str, Any] = {
    "truenorm": BatchNormalization,
    "keras": keras.layers.BatchNormalization,
}


def replace(model: Any, to: Literal["truenorm", "keras"], *, probe: Any = None) -> Rewrite:
    """Swap every BatchNormalization for truenorm's or for Keras's, weights and outputs kept.

    The function of the model stays: outputs are compared on a probe before the new model is
    returned. The model given is not changed. A layer with an option that Keras's does not have is
    left, with its reason in the receipt.

    Args:
        model: A functional or built Sequential ``keras.Model``, nested ones included.
        to: ``"truenorm"`` or ``"keras"``: whose layer every site shall have.
        probe: Inputs to compare on; made from the input specification where none are given.

    Returns:
        The new model with its receipt. Layer names, weights, ``trainable`` flags and the compile
        configuration are carried over; the optimizer starts anew. Weights are the same bit for
        bit, but under a 16-bit policy, where Keras's layer keeps its statistics in 16 bits.

    Raises:
        ModelError: The model is subclassed, not built, or has no BatchNormalization.
        OptionError: ``to`` is something else.
        VerificationError: The outputs would differ by more than rounding.

    Example:
        >>> import keras, truenorm as tn
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> rewrite = tn.replace(model, to="truenorm")
        >>> type(rewrite.model.layers[0]).__module__.split(".")[0], len(rewrite.changed)
        ('truenorm', 1)
    """
    if to not in _CLASSES:
        raise OptionError(
            "There is no such layer to replace by",
            where="to",
            expected="'truenorm' or 'keras'",
            received=repr(to),
        )
    target = _CLASSES[to]
    edit: dict[Any, list[Piece]] = {}

    def check(call: Call) -> Change | Left:
        layer = call.operation
        if type(layer) is target:
            return Left(call.path, f"it is {to}'s already")
        if is_own_class(layer):
            return Left(call.path, f"its class {type(layer).__name__} is a custom subclass")
        option = _only_ours(layer) if to == "keras" else None
        if option is not None:
            return Left(call.path, f"Keras's layer has nothing like its {option}")
        edit[layer] = [Piece(from_config(layer, target), layer)]
        return Change(call.path, f"now {to}'s BatchNormalization")

    graph = read_graph(model)
    changed, left = check_all(graph, check)
    new = rebuild(model, edit)
    proof = verify(graph, edit, (), new, probe, "Replacing")
    return Rewrite(new, f"replace to {to}", changed, left, *proof)


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
