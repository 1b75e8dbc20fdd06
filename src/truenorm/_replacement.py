"""Swap every BatchNormalization of a model for ours, or for Keras's own."""

from __future__ import annotations

from typing import Any, Literal

import keras

from truenorm._errors import OptionError
from truenorm._graph import Piece, rebuild
from truenorm._layer import BatchNormalization
from truenorm._probe import make_inputs, verify
from truenorm._records import Change, Left, Rewrite
from truenorm._sites import hidden, site_calls

_CLASSES: dict[str, type] = {
    "truenorm": BatchNormalization,
    "keras": keras.layers.BatchNormalization,
}


def replace(model: Any, to: Literal["truenorm", "keras"]) -> Rewrite:
    """Swap every BatchNormalization for truenorm's or for Keras's, weights and outputs kept.

    The function of the model stays: outputs are compared on inputs made from the model's own
    input specification before the new model is returned. The model given is not changed.

    Args:
        model: A functional or built Sequential ``keras.Model``, nested ones included.
        to: ``"truenorm"`` or ``"keras"``: whose layer every site shall have.

    Returns:
        The new model with its receipt. Layer names, weights (bit for bit), ``trainable`` flags and
        the compile configuration are carried over; the optimizer starts anew.

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
    _, sites = site_calls(model)
    edit: dict[Any, list[Piece]] = {}
    changed: list[Change] = []
    left = hidden(model, sites)
    for call in sites:
        layer = call.operation
        if type(layer) is target:
            left.append(Left(call.path, f"it is {to}'s already"))
        elif type(layer) not in _CLASSES.values():
            left.append(Left(call.path, f"its class {type(layer).__name__} is somebody's own"))
        else:
            edit[layer] = [Piece(target.from_config(layer.get_config()), layer.variables, layer)]
            changed.append(Change(call.path, f"now {to}'s BatchNormalization"))
    new = rebuild(model, edit)
    errors = verify(model, new, make_inputs(model), "Replacing")
    return Rewrite(new, f"replace to {to}", tuple(changed), tuple(left), *errors)
