"""The BatchNormalization calls of a model: what is around them, and which were asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import keras

from truenorm._checks import meant
from truenorm._errors import ModelError, OptionError
from truenorm._keras_internals import activation_operations, layers_in
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._model.graph import (
    Call,
    Graph,
    graph_of,
    is_batch_normalization,
    layer_paths,
    read_graph,
    require_graph,
)
from truenorm._records.rewrite import Change, Left
from truenorm._records.site import Site
from truenorm._records.tables import counted

Where = str | Callable[[Site], bool] | None
"""Which sites: a path pattern such as ``block1/*``, a predicate on the Site, or None for all."""

ACTIVATIONS = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ELU,
)
LINEAR = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


def is_activation(call: Call | None) -> bool:
    """Whether this is a layer or function that is an activation and nothing else."""
    if call is None or isinstance(call.operation, keras.Layer):
        return call is not None and isinstance(call.operation, ACTIVATIONS)
    return type(call.operation) in activation_operations()


def is_sum(call: Call) -> bool:
    """Whether this adds tensors: Keras's layer, or the operation that ``+`` makes."""
    kind = type(call.operation)
    return len(call.producers) > 1 and (
        isinstance(call.operation, keras.layers.Add)
        or (kind.__name__ == "Add" and kind.__module__.split(".")[0] == "keras")
    )


def is_linear(call: Call | None) -> bool:
    """Whether this is a convolution or dense layer (its own activation aside)."""
    return call is not None and isinstance(call.operation, LINEAR)


def is_quantised(layer: Any) -> bool:
    """Whether a convolution or dense layer is quantised or has LoRA: it has other variables."""
    return layer.quantization_mode is not None or getattr(layer, "lora_enabled", False)


def fused_activation(call: Call | None) -> str | None:
    """Name of the activation inside a convolution or dense layer; None if there is none."""
    if call is None or not is_linear(call):
        return None
    activation = call.operation.activation
    return None if activation in (None, keras.activations.linear) else name_of(activation)


def name_of(activation: Any) -> str:
    """Name of an activation: a function, or a layer by its class."""
    return getattr(activation, "__name__", type(activation).__name__)


def is_own_class(layer: Any) -> bool:
    """Whether this BatchNormalization is of a user's class: what that one computes is unknown."""
    return type(layer) not in (keras.layers.BatchNormalization, BatchNormalization)


def site_calls(model: Any) -> tuple[list[Call], list[Left]]:
    """The calls that are a BatchNormalization, and the layers that no such call can be seen of."""
    graph = read_graph(model)
    return list(graph.sites), hidden(graph)


def hidden(graph: Graph) -> list[Left]:
    """The BatchNormalization layers inside another layer, whose call is not a graph."""
    seen = {call.operation for call in graph.sites}
    return [
        Left(path, "inside a layer whose call is not a graph (a wrapper or a subclass)")
        for layer, path in batch_normalizations(graph.model).items()
        if layer not in seen
    ]


@dataclass(eq=False, frozen=True)
class Spot:
    """A place where a BatchNormalization is called, in any model.

    Args:
        path: Its path, as in :class:`Site`.
        layer: The layer.
        call: Its call in the model's graph; None where there is no graph to see it in (a subclassed
            model, the inside of a wrapper): then all its calls are one spot.
    """

    path: str
    layer: Any
    call: Call | None


def spots(model: Any) -> list[Spot]:
    """Every BatchNormalization call of any model, as far as a graph tells them apart."""
    paths = batch_normalizations(model)
    sites = () if graph_of(model) is None else read_graph(model).sites
    seen = {call.operation for call in sites}
    in_graph = [Spot(call.path, call.operation, call) for call in sites]
    return in_graph + [Spot(p, layer, None) for layer, p in paths.items() if layer not in seen]


def batch_normalizations(model: Any) -> dict[Any, str]:
    """Path of every BatchNormalization of any model."""
    if not isinstance(model, keras.Model):
        require_graph(model)
    layers = {k: path for k, path in layer_paths(model).items() if is_batch_normalization(k)}
    if not layers:
        raise ModelError(
            "This model has no BatchNormalization",
            where=model.name,
            expected="at least one BatchNormalization layer",
            received=f"{counted(len(model.layers), 'layer')}, none of that kind",
        )
    for layer, path in layers.items():
        if not layer.built:
            raise ModelError(
                "This BatchNormalization has no variables yet: its number of channels is not known",
                where=path,
                remedy="build the model, or call it once",
            )
    return layers


Layers = str | Callable[[Any], bool] | Iterable[Any] | None
"""Which layers: a path pattern, a predicate on the layer, a list of both and of layers, or all."""


def chosen_layers(model: Any, layers: Layers) -> dict[Any, str]:
    """Path of every BatchNormalization that is meant; none is an error."""
    single = isinstance(layers, str) or callable(layers) or not isinstance(layers, Iterable)
    wanted = [layers] if single else list(cast(Iterable[Any], layers))
    known = batch_normalizations(model)
    chosen = {
        layer: path
        for layer, path in known.items()
        if any(_is_meant(one, layer, path) for one in wanted)
    }
    if not chosen:
        raise OptionError(
            "No BatchNormalization of the model is meant by this",
            where="layers",
            expected="a path pattern, a predicate on the layer, or a list of patterns and layers",
            received=repr(layers),
            remedy=(meant(layers, known.values()) if isinstance(layers, str) else None)
            or "look the paths up with truenorm.inspect(model)",
        )
    return chosen


def _is_meant(wanted: Any, layer: Any, path: str) -> bool:
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return fnmatchcase(path, wanted)
    if isinstance(wanted, keras.Layer):  # callable too
        return layer in layers_in(wanted)
    return callable(wanted) and bool(wanted(layer))


Check = Callable[[Call], Change | Left]
"""Looks at one site: changes it (in an edit that it fills), or says why it is left."""


def check_all(
    check: Check, sites: Iterable[Call], others: Iterable[Change | Left]
) -> tuple[tuple[Change, ...], tuple[Left, ...]]:
    """What the check does at every site, and what is known of others: the receipt of a rewrite."""
    results = [*map(check, sites), *others]
    changed = tuple(result for result in results if isinstance(result, Change))
    return changed, tuple(result for result in results if isinstance(result, Left))


Result = TypeVar("Result", Change, Left)


def with_kinds(labels: Collection[str], results: Sequence[Result]) -> tuple[Result, ...]:
    """What was done or left, each with the words that all alike share: labels without names."""
    longest_first = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    label = re.compile(rf"\b({longest_first})(?!\w)") if labels else re.compile(r"(?!)")

    def kind(said: str) -> str:
        return label.sub(lambda found: found[1].split(" ", 1)[0], said)

    return tuple(
        replace(one, kind=kind(one.what if isinstance(one, Change) else one.reason))
        for one in results
    )


def selector(where: Where) -> Callable[[Call], bool]:
    """``where`` as a test of a call."""
    if where is None:
        return lambda _: True
    if isinstance(where, str):
        return lambda call: fnmatchcase(call.path, where)
    if callable(where):
        return lambda call: bool(where(describe(call)))
    raise OptionError(
        "The selection of sites is not understood",
        where="where",
        expected="a path pattern, a predicate on a Site, or None",
        received=repr(where),
    )


def position(call: Call) -> str | None:
    """Where a BatchNormalization is; None if at none of the named positions."""
    producer, consumer = call.only_producer, call.only_consumer
    if is_activation(producer) or fused_activation(producer):
        return "after_activation"
    if is_activation(consumer) or getattr(call.operation, "activation", None) is not None:
        return "before_activation" if is_linear(producer) else "before_layer"
    return None


def describe(call: Call) -> Site:
    """The record of one site."""
    return describe_spot(Spot(call.path, call.operation, call))


def describe_spot(spot: Spot) -> Site:
    """The record of one spot; what is around it is known of a call in a graph only."""
    layer, call, activation = spot.layer, spot.call, getattr(spot.layer, "activation", None)
    producers = () if call is None else call.producers
    return Site(
        path=spot.path,
        layer=f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}",
        producer=" + ".join("input" if p is None else p.label() for p in producers) or None,
        consumers=() if call is None else tuple(c.label() for c in call.consumers),
        position=None if call is None else position(call),
        axis=channel_axis(layer),
        channels=int(layer.moving_mean.shape[-1]),
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        trainable=bool(layer.trainable),
        policy=policy_of(layer),
        activation=None if activation is None else name_of(activation),
        adds=call is not None and "add" in call.extras,
    )


def policy_of(layer: Any) -> str:
    """The freeze policy that is in effect: ``none``, ``all``, ``statistics`` or ``affine``."""
    return getattr(layer, "freeze", None) or ("none" if layer.trainable else "all")


def channel_axis_of(layer: Any, rank: int) -> int:
    """The axis that a layer takes for that of the channels, of an input of so many axes."""
    given = getattr(layer, "data_format", "channels_last") or keras.config.image_data_format()
    return 1 if given == "channels_first" else rank - 1


def channel_axis(layer: Any) -> int:
    """The axis of the channels, counted from the left."""
    rank = layer.input_spec.ndim
    return layer.axis % rank
