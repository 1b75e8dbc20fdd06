"""Move or remove the BatchNormalization layers of a model, around its activations.

Each rule looks at one site (pattern), says why it cannot be moved or how (check), and gives the
edit (rewrite): which chain of layers stands in the place of each layer concerned.
"""

from __future__ import annotations

from typing import Any, Literal

import keras
import numpy as np

from truenorm._errors import OptionError
from truenorm._graph import Call
from truenorm._rebuilding import Piece, copy_of, rebuild
from truenorm._records.rewrites import Change, Rewrite
from truenorm._records.sites import Left
from truenorm._sites import Where, apply, fused_activation, is_activation, is_linear, selector

Position = Literal["none", "before_activation", "after_activation"]


def place(model: Any, position: Position, *, where: Where = None) -> Rewrite:
    """Move every BatchNormalization before or after its activation, or remove it.

    A site is moved when its layer and the activation concerned follow each other directly, and
    neither is called anywhere else; every other site is left, with its reason in the receipt: one
    before an activation that is an output of the model, for instance, which must stay one. An
    activation inside a convolution or dense layer is split out, so that BatchNormalization can
    stand before it. Where one is removed, the convolution or dense layer before it gets the bias
    that it may lack, starting at zero.

    Moving is not meant to keep the function: after it, moving statistics and gamma and beta belong
    to another input. Train the new model, or call :func:`truenorm.recalibrate` for the statistics.

    Args:
        model: A functional or built Sequential ``keras.Model``, nested ones included. It is not
            changed.
        position: ``"after_activation"``, ``"before_activation"`` or ``"none"`` (remove).
        where: Which sites: a path pattern (``"block1/*"``), a predicate on a
            :class:`truenorm.Site`, or None for all.

    Returns:
        The new model with its receipt; all weights are carried over.

    Raises:
        ModelError: The model is subclassed, not built, or has no BatchNormalization.
        OptionError: ``position`` or ``where`` is something else.

    Example:
        >>> import keras, truenorm as tn
        >>> model = keras.Sequential([
        ...     keras.Input((8,)), keras.layers.Dense(4), keras.layers.BatchNormalization(),
        ...     keras.layers.ReLU(), keras.layers.Dense(2)])
        >>> moved = tn.place(model, "after_activation").model
        >>> [type(layer).__name__ for layer in moved.layers]
        ['Dense', 'ReLU', 'BatchNormalization', 'Dense']

    Reference:
        Before the activation: Ioffe and Szegedy (2015), "Batch Normalization", section 3.2,
        arXiv:1502.03167. That order in practice is contested; :func:`truenorm.study` measures it.
    """
    if position not in _RULES:
        raise OptionError(
            "There is no such position",
            where="position",
            expected=" or ".join(repr(name) for name in _RULES),
            received=repr(position),
        )
    wanted, edit = selector(where), dict[Any, list[Piece]]()

    def rule(call: Call) -> Change | Left:
        result = _RULES[position](call) if wanted(call) else "not selected"
        if isinstance(result, str):
            return Left(call.path, result)
        what, its_edit = result
        edit.update(its_edit)
        return Change(call.path, what)

    changed, left = apply(rule, model)
    notes = (_AFTER_A_MOVE,) if changed and position != "none" else ()
    return Rewrite(rebuild(model, edit), f"place {position}", changed, left, notes=notes)


_AFTER_A_MOVE = (
    "Moving statistics, gamma and beta belong to the old position: train the new model, or call "
    "truenorm.recalibrate(model, data) for the statistics."
)


Result = str | tuple[str, dict[Any, list[Piece]]]
"""Why a site is left, or what is done to it and how."""


def _after(call: Call) -> Result:
    consumer = call.only_consumer
    if is_activation(call.only_producer) or fused_activation(call.only_producer):
        return "already after an activation"
    if consumer is None or not is_activation(consumer):
        takers = ", ".join(c.label() for c in call.consumers) or "nothing: it is an output"
        return f"not directly followed by an activation, but by {takers}"
    if consumer.is_output:
        return f"{consumer.label()} is an output of the model, and must stay one"
    hindrance = _cannot_move(call, consumer)
    if hindrance:
        return hindrance
    chain = [copy_of(consumer.operation), _moved(call)]
    return f"moved behind {consumer.label()}", {call.operation: [], consumer.operation: chain}


def _before(call: Call) -> Result:
    producer = call.only_producer
    fused = fused_activation(producer)
    if is_activation(call.only_consumer):
        return "already before an activation"
    if producer is None or not (is_activation(producer) or fused):
        return "its input does not come directly from an activation"
    if producer.only_consumer is not call:
        return f"{producer.label()} has other consumers too"
    hindrance = _cannot_move(call, producer)
    if hindrance:
        return hindrance
    source = producer.operation
    if not fused:
        chain = [_moved(call), copy_of(source)]
        return f"moved before {producer.label()}", {call.operation: [], source: chain}
    activation = keras.layers.Activation(
        source.activation, name=f"{source.name}_activation", dtype=source.dtype_policy
    )
    chain = [copy_of(source, activation="linear"), _moved(call), Piece(activation)]
    what = f"moved before '{fused}', split out of {producer.label()}"
    return what, {call.operation: [], source: chain}


def _none(call: Call) -> Result:
    producer = call.only_producer
    edit: dict[Any, list[Piece]] = {call.operation: []}
    if producer is None or not is_linear(producer) or producer.operation.use_bias:
        return "removed", edit
    if producer.only_consumer is not call or producer.shared or call.shared:
        return f"removed; {producer.label()} stays without bias: it is used elsewhere too", edit
    source = producer.operation
    bias = np.zeros(call.operation.moving_mean.shape, "float32")
    edit[source] = [copy_of(source, [*source.variables, bias], use_bias=True)]
    return f"removed; {producer.label()} got a bias", edit


def _cannot_move(call: Call, activation: Call) -> str | None:
    if call.shared or activation.shared:
        return "it or its activation is called more than once"
    if call.extras:
        return f"it is called with {', '.join(call.extras)}, which belongs to its old input"
    return None


def _moved(call: Call) -> Piece:
    return copy_of(call.operation, training=call.training)


_RULES = {"none": _none, "before_activation": _before, "after_activation": _after}
