"""Move or remove the BatchNormalization layers of a model, around its activations.

Each rule looks at one site (pattern), says why it cannot be moved or how (check), and gives the
edit (rewrite): which chain of layers stands in the place of each layer concerned.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import keras
import numpy as np

from truenorm._errors import OptionError
from truenorm._graph import Call, Edit, Piece, copy_of, rebuild
from truenorm._records import Change, Left, Rewrite
from truenorm._sites import (
    Where,
    fused_activation,
    hidden,
    is_activation,
    is_linear,
    selector,
    site_calls,
)

Position = Literal["none", "before_activation", "after_activation"]


def place(model: Any, position: Position, *, where: Where = None) -> Rewrite:
    """Move every BatchNormalization before or after its activation, or remove it.

    A site is moved when its layer and the activation concerned follow each other directly, and
    neither is called anywhere else; every other site is left, with its reason in the receipt. An
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
        ...     keras.layers.ReLU()])
        >>> moved = tn.place(model, "after_activation").model
        >>> [type(layer).__name__ for layer in moved.layers]
        ['Dense', 'ReLU', 'BatchNormalization']

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
    every, sites = site_calls(model)
    wanted, times = selector(where), Counter(id(call.operation) for call in every)
    edit: dict[Any, list[Piece]] = {}
    changed: list[Change] = []
    left = hidden(model, sites)
    for call in sites:
        result = _RULES[position](call, times) if wanted(call) else "not selected"
        if isinstance(result, str):
            left.append(Left(call.path, result))
        else:
            what, its_edit = result
            changed.append(Change(call.path, what))
            edit.update({layer: list(chain) for layer, chain in its_edit.items()})
    moved = bool(changed) and position != "none"
    return Rewrite(
        rebuild(model, edit),
        f"place {position}",
        tuple(changed),
        tuple(left),
        notes=(_AFTER_A_MOVE,) if moved else (),
    )


_AFTER_A_MOVE = (
    "Moving statistics, gamma and beta belong to the old position: train the new model, or call "
    "truenorm.recalibrate(model, data) for the statistics."
)


Result = str | tuple[str, Edit]
"""Why a site is left, or what is done to it and how."""


def _after(call: Call, times: Counter[int]) -> Result:
    consumer = call.only_consumer
    if is_activation(call.only_producer) or fused_activation(call.only_producer):
        return "already after an activation"
    if consumer is None or not is_activation(consumer):
        takers = ", ".join(c.label() for c in call.consumers) or "nothing: it is an output"
        return f"not directly followed by an activation, but by {takers}"
    if _shared(times, call, consumer):
        return "it or its activation is called more than once"
    layer, activation = call.operation, consumer.operation
    return (
        f"moved behind {consumer.label()}",
        {layer: [], activation: [copy_of(activation), copy_of(layer)]},
    )


def _before(call: Call, times: Counter[int]) -> Result:
    producer = call.only_producer
    fused = fused_activation(producer)
    if is_activation(call.only_consumer):
        return "already before an activation"
    if producer is None or not (is_activation(producer) or fused):
        return "its input does not come directly from an activation"
    if producer.only_consumer is not call:
        return f"{producer.label()} has other consumers too"
    if _shared(times, call, producer):
        return "it or its activation is called more than once"
    layer, source = call.operation, producer.operation
    if not fused:
        return (
            f"moved before {producer.label()}",
            {layer: [], source: [copy_of(layer), copy_of(source)]},
        )
    activation = keras.layers.Activation(
        source.get_config()["activation"],
        name=f"{source.name}_activation",
        dtype=source.dtype_policy,
    )
    chain = [copy_of(source, activation="linear"), copy_of(layer), Piece(activation, ())]
    return f"moved before '{fused}', split out of {producer.label()}", {layer: [], source: chain}


def _none(call: Call, times: Counter[int]) -> Result:
    producer = call.only_producer
    edit: dict[Any, list[Piece]] = {call.operation: []}
    if producer is None or not is_linear(producer) or producer.operation.use_bias:
        return "removed", edit
    if producer.only_consumer is not call or _shared(times, call, producer):
        return f"removed; {producer.label()} stays without bias: it is used elsewhere too", edit
    source = producer.operation
    bias = np.zeros(call.operation.moving_mean.shape, "float32")
    edit[source] = [copy_of(source, [*source.variables, bias], use_bias=True)]
    return f"removed; {producer.label()} got a bias", edit


def _shared(times: Counter[int], *its_calls: Call) -> bool:
    return any(times[id(call.operation)] > 1 for call in its_calls)


_RULES = {"none": _none, "before_activation": _before, "after_activation": _after}
