"""Move, insert or remove the BatchNormalization layers of a model, around its activations.

Each rule looks at one site (pattern), says why it cannot be moved or how (check), and gives the
edit (rewrite): which chain of layers stands in the place of each layer concerned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import keras
import numpy as np

from truenorm._checks import known_options, meant
from truenorm._errors import OptionError
from truenorm._model.edit import Piece, copy_of
from truenorm._model.graph import (
    Call,
    is_batch_normalization,
    label_of,
    layer_paths,
    read_graph,
)
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import (
    Where,
    channel_axis,
    check_all,
    fused_activation,
    hidden,
    is_activation,
    is_linear,
    is_quantised,
    is_sum,
    selector,
    with_kinds,
)
from truenorm._records.rewrite import Change, Left, Rewrite
from truenorm._rewrites.insert import insertion, lacks_batch_normalization, split, split_name

Position = Literal["none", "before_activation", "after_activation"]
"""The positions that any model can have, and that a study compares unless told otherwise."""


@known_options
def place(
    model: Any,
    position: Position | Literal["before_layer"],
    *,
    where: Where = None,
    insert: bool = False,
) -> Rewrite:
    r"""Move every BatchNormalization before or after its activation, remove or insert it.

    A site is moved when its layer and the activation concerned follow each other directly, and
    neither is called anywhere else; every other site is left, with its reason in the receipt: one
    before an activation that is an output of the model, for instance, which must stay one.
    Activations are the layers and functions that are nothing else (``ReLU``, ``PReLU``,
    ``keras.ops.silu``…); softmax, which mixes channels, is none if called as a function. An
    activation inside a convolution or dense layer ``conv`` is split out as ``conv_activation``, so
    that BatchNormalization can stand before it; on the way back one of that name is merged in
    again. Where one is removed, the convolution or dense layer before it gets the bias
    that it may lack, starting at zero; :func:`truenorm.fold` with ``where=`` removes it and puts
    its scale and shift into that layer, which keeps the function.

    ``"before_layer"`` is pre-activation: BatchNormalization, then the activation, then what they
    are for, the next convolution or dense layer. In a plain chain that is the same as before the
    activation, and such sites are left. It differs at the additions of residual networks, where
    one BatchNormalization moves from before the addition to behind it, before the activation; if
    what follows is another residual branch and its shortcut, both go onto the branch, and the
    shortcut carries the bare sum:

    .. math:: x' = \phi(x + BN(F(x))) \quad\to\quad x' = x + F(\phi(BN(x))) .

    The first activation, before all blocks, stays, and so does one more behind the last addition,
    as in the reference; no weight is lost and none is new.

    Moving is not meant to keep the function: after it, moving statistics and gamma and beta belong
    to another input. Train the new model, or call :func:`truenorm.recalibrate` for the statistics.

    Args:
        model: A functional or built Sequential ``keras.Model``, nested ones included. It is not
            changed.
        position: ``"after_activation"``, ``"before_activation"``, ``"before_layer"`` or ``"none"``
            (remove).
        where: Which sites: a path pattern (``"block1/*"``), a predicate on a
            :class:`truenorm.Site`, or None for all. With ``insert`` a pattern or None: it is
            compared with the path of the convolution or dense layer.
        insert: Whether every convolution and dense layer that comes to no BatchNormalization
            before the next such layer gets one, before or after its activation; output layers
            get none. It is Keras's layer, with Keras's defaults: :func:`truenorm.replace` makes
            it truenorm's.

    Returns:
        The new model with its receipt; all weights are carried over.

    Raises:
        ModelError: The model is subclassed, not built, or has no BatchNormalization (and shall
            get none).
        OptionError: ``position``, ``where`` or ``insert`` is something else, or ``insert`` does
            not go with the others.

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
        Before the layer: He, Zhang, Ren and Sun (2016), "Identity Mappings in Deep Residual
        Networks", section 4, arXiv:1603.05027.
    """
    if position not in list(_RULES):  # which may not be hashable
        raise OptionError(
            "There is no such position",
            where="position",
            expected=" or ".join(repr(name) for name in _RULES),
            received=repr(position),
            remedy=meant(position, _RULES),
        )
    _require_insertable(position, where, insert)
    wanted, edit, graph = selector(where), dict[Any, list[Piece]](), read_graph(model)
    homes = {call.operation: call.path.rpartition("/")[0] for call in graph.calls}
    names = {(home, operation.name) for operation, home in homes.items()}
    names |= {("", tensor.name) for tensor in model.inputs}
    for home in set(homes.values()) - {""}:  # the nested models themselves
        names.add((home.rpartition("/")[0], home.rpartition("/")[2]))

    def entry(call: Call, rule: Callable[[Call], Result]) -> Change | Left:
        result = rule(call) if wanted(call) else "not selected"
        if isinstance(result, str):
            return Left(call.path, result)
        what, its_edit = result
        if any(edit.get(layer, chain) != chain for layer, chain in its_edit.items()):
            return Left(call.path, "a layer next to it is changed for another site: place again")
        came = {(homes[k], piece.layer.name) for k, chain in its_edit.items() for piece in chain}
        taken = (came - {(homes[k], k.name) for k in its_edit}) & names
        if taken:
            return Left(call.path, f"where it would go, {taken.pop()[1]} is a name already")
        names.update(came)
        edit.update(its_edit)
        return Change(call.path, what)

    changed, left, notes = (), (), ()
    if not insert or any(map(is_batch_normalization, layer_paths(model))):
        changed, left = check_all(
            lambda call: entry(call, partial(_moving, position)), graph.sites, hidden(graph)
        )
    if changed:
        notes += (_AFTER_REMOVAL if position == "none" else _AFTER_A_MOVE,)
    if insert:
        used = {call.operation.name for call in graph.calls}
        behind = position == "after_activation"
        add = partial(insertion, behind_activation=behind, taken=used)
        results = [entry(call, add) for call in graph.calls if lacks_batch_normalization(call)]
        new = tuple(result for result in results if isinstance(result, Change))
        notes += (_AFTER_INSERTION,) if new else ()
        changed += new
        left += tuple(result for result in results if isinstance(result, Left))
    labels = graph.labels | {label_of(piece.layer) for chain in edit.values() for piece in chain}
    changed, left = with_kinds(labels, changed), with_kinds(labels, left)
    return Rewrite(rebuild(model, edit), f"place {position}", changed, left, notes=notes)


def _require_insertable(position: str, where: Where, insert: Any) -> None:
    around = position in ("before_activation", "after_activation")
    if insert not in (True, False) or (insert and (callable(where) or not around)):
        raise OptionError(
            "BatchNormalization cannot be inserted like this",
            where="insert",
            expected="True or False; if True, the position before_activation or after_activation, "
            "and where= a path pattern or None",
            received=f"insert={insert!r}, position={position!r}, where={where!r}",
            remedy="insert it before the activation first, then place the result elsewhere",
        )


_AFTER_A_MOVE = (
    "Moving statistics, gamma and beta belong to the old position: train the new model, or call "
    "truenorm.recalibrate(model, data) for the statistics."
)
_AFTER_INSERTION = (
    "A new BatchNormalization has mean 0, variance 1, gamma 1 and beta 0: train the new model, or "
    "call truenorm.recalibrate(model, data) for the statistics."
)
_AFTER_REMOVAL = (
    "What was removed no longer scales and shifts: train the new model. To be rid of the layers "
    "and keep the outputs, use truenorm.fold(model)."
)


Result = str | tuple[str, dict[Any, list[Piece]]]
"""Why a site is left, or what is done to it and how."""


def _moving(position: str, call: Call) -> Result:
    if getattr(call.operation, "activation", None) is not None:
        return "it has an activation of its own inside"
    if "add" in call.extras:
        return "it adds a tensor to what it normalises"
    return _RULES[position](call)


def _after(call: Call) -> Result:
    consumer = call.only_consumer
    if is_activation(call.only_producer) or fused_activation(call.only_producer):
        return "already after an activation"
    if consumer is None or not is_activation(consumer):
        return f"not directly followed by an activation, but by {_takers(call)}"
    if consumer.is_output:
        return f"{consumer.label()} is an output of the model, and must stay one"
    hindrance = _cannot_move(call, consumer)
    if hindrance:
        return hindrance
    source, activation = call.only_producer, consumer.operation
    if source is not None and _was_split(source, call, activation):
        merged = copy_of(source.operation, activation=activation.activation)
        edit = {source.operation: [merged, _moved(call)], call.operation: [], activation: []}
        return f"moved behind {consumer.label()}, merged into {source.label()}", edit
    chain = [copy_of(activation), _moved(call)]
    return f"moved behind {consumer.label()}", {call.operation: [], activation: chain}


def _was_split(source: Call, call: Call, activation: Any) -> bool:
    """Whether this activation looks as if it had been split out of the layer before ``call``."""
    return (
        isinstance(activation, keras.layers.Activation)
        and is_linear(source)
        and not fused_activation(source)
        and not source.shared
        and source.only_consumer is call
        and activation.trainable
        and activation.name == split_name(source.operation)
        and activation.dtype_policy == source.operation.dtype_policy
    )


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
    bare, activation = split(source)
    chain = [bare, _moved(call), activation]
    what = f"moved before '{fused}', split out of {producer.label()}"
    return what, {call.operation: [], source: chain}


def _before_layer(call: Call) -> Result:
    producer, consumer = call.only_producer, call.only_consumer
    if is_activation(producer) or fused_activation(producer):
        if _feeds_linear_only(call):
            return _before(call)
        return f"its output goes to {_takers(call)}, not to convolution or dense layers alone"
    if consumer is not None and is_activation(consumer):
        if _feeds_linear_only(consumer):
            return f"already before {_takers(consumer)}, {consumer.label()} between them"
        return f"{consumer.label()} behind it goes to {_takers(consumer)}, and stays before it"
    if consumer is None or not is_sum(consumer):
        return f"not followed by an activation or an addition, but by {_takers(call)}"
    return _behind_sum(call, consumer)


def _behind_sum(call: Call, total: Call) -> Result:
    """From before a residual addition to behind it, and onto the next branch if there is one."""
    activation = total.only_consumer
    if activation is None or not is_activation(activation):
        return f"{total.label()} is not followed by an activation alone, but by {_takers(total)}"
    last = [c for c in total.producers if c and is_batch_normalization(c.operation)][-1]
    if last is not call:
        return f"one behind {total.label()} is enough: {last.label()} is the one to move"
    hindrance = _cannot_move(call, activation)
    if hindrance:
        return hindrance
    pair = [_moved(call), copy_of(activation.operation)]
    branches = [c for c in activation.consumers if not is_sum(c)]
    if len(branches) == len(activation.consumers):
        what = f"moved behind {total.label()}, before {activation.label()}"
        return what, {call.operation: [], activation.operation: pair}
    if activation.is_output:
        return f"{activation.label()} is an output of the model, and must stay one"
    if len(branches) != 1 or not is_linear(branches[0]) or branches[0].shared:
        others = ", ".join(c.label() for c in branches) or "nothing"
        return f"beside the shortcut {activation.label()} goes to {others}, not to one layer"
    layer = branches[0]
    if layer.path.rpartition("/")[0] != activation.path.rpartition("/")[0]:
        return f"{layer.label()} is in another model than {activation.label()}"
    what = f"moved with {activation.label()} before {layer.label()}; the shortcut is the bare sum"
    chain = [*pair, copy_of(layer.operation)]
    return what, {call.operation: [], activation.operation: [], layer.operation: chain}


def _feeds_linear_only(call: Call) -> bool:
    return bool(call.consumers) and not call.is_output and all(map(is_linear, call.consumers))


def _takers(call: Call) -> str:
    return ", ".join(c.label() for c in call.consumers) or "nothing: it is an output"


def _none(call: Call) -> Result:
    producer = call.only_producer
    edit: dict[Any, list[Piece]] = {call.operation: []}
    if producer is None or not is_linear(producer) or producer.operation.use_bias:
        return "removed", edit
    if not _is_along_its_channels(call, producer.operation):
        return "removed", edit
    if producer.only_consumer is not call or producer.shared or call.shared:
        return f"removed; {producer.label()} stays without bias: it is used elsewhere too", edit
    if is_quantised(producer.operation):
        why = "it is quantised or has LoRA enabled"
        return f"removed; {producer.label()} stays without bias: {why}", edit
    source = producer.operation
    bias = np.zeros(call.operation.moving_mean.shape[-1], "float32")
    beta = call.operation.beta
    frozen = ("bias",) if beta is not None and not beta.trainable else ()
    edit[source] = [copy_of(source, [*source.variables, bias], use_bias=True, frozen=frozen)]
    return f"removed; {producer.label()} got a bias", edit


def _is_along_its_channels(call: Call, source: Any) -> bool:
    (axis,) = source.input_spec.axes
    return channel_axis(call.operation) == axis % len(call.input_shapes[0])


def _cannot_move(call: Call, activation: Call) -> str | None:
    if call.shared or activation.shared:
        return "it or its activation is called more than once"
    if call.extras:
        return f"it is called with {', '.join(call.extras)}, which belongs to its old input"
    homes = {one.path.rpartition("/")[0] for one in (call, activation)}
    if len(homes) > 1 and call.operation.trainable and not activation.operation.trainable:
        return f"{activation.label()} is in a frozen model, where it would be frozen too"
    return None


def _moved(call: Call) -> Piece:
    return copy_of(call.operation, training=call.training)


_RULES = {
    "none": _none,
    "before_activation": _before,
    "after_activation": _after,
    "before_layer": _before_layer,
}


def can_be_placed(call: Call, position: Position) -> bool:
    """Whether a site can be moved there."""
    return not isinstance(_RULES[position](call), str)
