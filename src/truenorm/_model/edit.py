"""What shall stand in the place of a layer when a model is made anew.

An *edit* maps a layer to the *chain* of pieces that stands in its place: an empty chain removes the
layer, two pieces insert one, a piece of another class replaces it. Moving a BatchNormalization
behind its activation is ``{bn: [], activation: [activation, bn]}``. All rewrites are edits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from truenorm._errors import ModelError, OptionError
from truenorm._keras_internals import operation_like


@dataclass(eq=False)
class Piece:
    """A new layer for the new model, and what it shall be.

    Args:
        layer: A layer that is not called anywhere yet.
        source: The layer of the old model that it stands for, whose state it gets; None for a
            layer that has no forerunner. An operation that is not a layer has no state.
        values: One array per variable, in Keras's order, where they are not the source's. What
            else is set on a variable comes from that of the same name.
        arguments: What it is called with besides its input. In the place of its own source it is
            called with all that the source was called with, as far as it takes it.
        frozen: Names of variables that the source does not have and that shall not learn.
        call: How it is called, if not so: ``call(layer, value, given)``, with what comes to it and
            with all that the operation in whose place it stands is given, by name.
    """

    layer: Any
    source: Any = None
    values: Sequence[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    frozen: Collection[str] = ()
    call: Callable[[Any, Any, Mapping[str, Any]], Any] | None = None


Edit = Mapping[Any, Sequence[Piece]]

_OF_EVERY_LAYER = ("name", "trainable", "dtype")


def copy_of(
    layer: Any,
    values: Sequence[Any] | None = None,
    *,
    training: bool | None = None,
    frozen: Collection[str] = (),
    **changes: Any,
) -> Piece:
    """A copy of a layer; ``changes`` go over its config, ``training`` into its call."""
    arguments = {} if training is None else {"training": training}
    if not isinstance(layer, keras.Layer):
        return Piece(operation_like(layer), layer, values, arguments, frozen)
    return Piece(from_config(layer, type(layer), **changes), layer, values, arguments, frozen)


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, or one like it that is not taken."""
    while name in taken:
        name += "_"
    return name


def activation_of(layer: Any, name: str) -> Piece:
    """What a layer does last, its activation, as a layer that shares nothing with it."""
    inside = layer.activation
    if not isinstance(inside, keras.Layer):
        return Piece(keras.layers.Activation(inside, name=name, dtype=layer.dtype_policy))
    piece = copy_of(inside, name=name)
    if not inside.built:  # Keras does so at its first call: it has no state yet
        piece.source = None
    return piece


def own_variables(layer: Any) -> list[Any]:
    """The variables of a layer without those of an activation that is a layer."""
    theirs = {id(variable) for variable in getattr(layer.activation, "variables", ())}
    return [variable for variable in layer.variables if id(variable) not in theirs]


def through(chain: Sequence[Piece], operation: Any, args: Any, kwargs: Any) -> Any:
    """What the chain that stands in the place of an operation makes of its arguments."""
    value = given = args[0] if args else next(iter(kwargs.values()))
    for piece in chain:
        if piece.call is not None:
            names = inspect.signature(operation.call).parameters
            value = piece.call(piece.layer, value, dict(zip(names, args, strict=False)) | kwargs)
        elif piece.source is operation and value is given:
            taken = inspect.signature(piece.layer.call).parameters
            value = piece.layer(*args, **{k: v for k, v in kwargs.items() if k in taken})
        else:
            value = piece.layer(value, **piece.arguments)
    return value


def from_config(layer: Any, kind: Any, **changes: Any) -> Any:
    """A layer of a class from the config of another one, as far as it goes, with changes."""
    own = None
    if type(layer) is not kind:
        own = {*inspect.signature(kind).parameters, *_OF_EVERY_LAYER}

    def made(**config: Any) -> Any:
        return kind.from_config({k: v for k, v in config.items() if own is None or k in own})

    try:
        try:
            new = made(**layer.get_config() | changes)
        except (TypeError, ValueError):  # it can only name a function or class of the user's
            new = made(**layer.get_config() | _objects_of(layer) | changes)
    except (TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error.__context__, OptionError):  # a layer of ours says itself what is wrong
            raise error.__context__ from None
        raise ModelError(
            f"This {type(layer).__name__} cannot be made again from its config",
            where=layer.name,
            received=str(error).strip().splitlines()[0],
            remedy="give its class a complete get_config()",
        ) from error
    if new.dtype_policy != layer.dtype_policy:
        new.dtype_policy = layer.dtype_policy  # SpatialDropout's config, for one, has half of it
    return new


def _objects_of(layer: Any) -> dict[str, Any]:
    """The functions, initializers and so on that the config of a layer names."""
    found = {name: getattr(layer, name, None) for name in layer.get_config()}
    return {k: v for k, v in found.items() if callable(v) and not isinstance(v, keras.Layer)}
