r"""Take the ReLU behind a BatchNormalization, and the residual sum between the two, into the layer.

.. math:: y = \max(0, BN(x)), \qquad y = \max(0, BN(x) + r) .

Three layers are then one pass over the data forward, and one backward. Of two BatchNormalization
whose outputs are added, as at the projections of ResNet, the last takes the sum in, and adds what
the other puts out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from truenorm._keras_internals import filled_in, keras_mask, operation_classes
from truenorm._model.edit import Edit, Piece
from truenorm._model.graph import Call, graph_of, is_site
from truenorm._model.hooks import patched
from truenorm._model.probe import run
from truenorm._model.sites import (
    Spot,
    channel_axis,
    is_activation,
    is_own_class,
    is_sum,
    spots,
)
from truenorm._model.values import as_float64
from truenorm._rewrites.verify_places import Place, by_channel, shaken

_SAMPLES, _LENGTH = 32, 2
"""Not those of the model: of few values a variance may be next to nothing, and all digits rounding.
"""

PLAIN_BATCHES = {"synchronized": False, "virtual_batch_size": None, "renorm": False}
"""Old and new take other statistics with other options, and would wait for other processes."""

_PLAIN: dict[str, Any] = {"negative_slope": 0.0, "max_value": None, "threshold": 0.0}


@dataclass(frozen=True, eq=False)
class Fusion:
    """What a BatchNormalization takes in.

    Args:
        site: Its call.
        total: The sum behind it, if there is one.
        relu: The ReLU behind that.
    """

    site: Call
    total: Call | None
    relu: Call

    @property
    def what(self) -> str:
        """What the receipt says."""
        taken = [call.label() for call in (self.total, self.relu) if call is not None]
        return f", with {' and '.join(taken)} taken in"


def fusions(model: Any) -> tuple[dict[Any, Fusion], dict[Any, str]]:
    """What each layer can take in; and of each that cannot, why."""
    found: dict[Any, Fusion] = {}
    reasons: dict[Any, str] = {}
    for spot in spots(model):
        fusion = _fusion(spot, known=graph_of(model) is not None)
        if isinstance(fusion, Fusion):
            found[spot.layer] = fusion
        else:
            reasons[spot.layer] = fusion
    return found, reasons


def fused(edit: Edit, found: Mapping[Any, Fusion]) -> dict[Any, list[Piece]]:
    """An edit that replaces layers, with those that take something in where the sum was."""
    whole = {layer: [*chain] for layer, chain in edit.items()}
    for layer in found.keys() & edit.keys():
        fusion = found[layer]
        if fusion.total is not None:
            (piece,) = edit[layer]
            whole[fusion.total.operation] = [replace(piece, call=_adding(fusion))]
            whole[layer] = []
        whole[fusion.relu.operation] = []
    return whole


def compared_fusions(
    edit: Edit, found: Mapping[Any, Fusion], *, only_rounding: bool = False
) -> list[Place]:
    """Old and new of what is taken in, on random numbers, in training and in inference.

    Args:
        edit: The layers in the place of those that take something in.
        found: What they take in.
        only_rounding: Compare the old not with the new but with itself, where each number that
            comes in or out is moved by one unit in the last place.
    """
    pairs = [(fusion, edit[layer][0].layer) for layer, fusion in found.items() if layer in edit]
    layers = [one for fusion, new in pairs for one in (fusion.site.operation, new)]
    drawn = [noise_for(fusion.site.operation) for fusion, _ in pairs]

    def compare(drawn: Any) -> Any:
        return [
            _compare(fusion, None if only_rounding else new, *noise)
            for (fusion, new), noise in zip(pairs, drawn, strict=True)
        ]

    with patched((layer, *option) for layer in layers for option in PLAIN_BATCHES.items()):
        compared = run(compare, layers, drawn)
    return [
        Place(fusion.relu.path, as_float64(difference), as_float64(extent))
        for (fusion, _), results in zip(pairs, compared, strict=True)
        for difference, extent in results
    ]


def noise_for(layer: Any) -> list[Any]:
    """Two tensors that a BatchNormalization takes, of random numbers."""
    shape = [_SAMPLES, *[_LENGTH] * (layer.input_spec.ndim - 1)]
    shape[channel_axis(layer)] = int(layer.moving_mean.shape[-1])
    return [*np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")]


def _compare(fusion: Fusion, new: Any, x: Any, other: Any) -> list[Any]:
    """Before the ReLU, which would hide what is negative, and behind it."""
    old, axis, results = fusion.site.operation, channel_axis(fusion.site.operation), list[Any]()
    added = {} if fusion.total is None else {"add": other}
    for training in (False, True):  # Which moves the statistics.

        def before(x: Any, training: bool = training) -> tuple[Any, Any]:
            bare = old(x, training=training)
            if fusion.total is not None:
                places = range(2) if _first(fusion) else (1, 0)
                args, kwargs = filled_in(fusion.total.node, [(bare, other)[at] for at in places])
                bare = fusion.total.operation(*args, **kwargs)
            return bare, fusion.relu.operation(bare)

        olds = before(x)
        if new is None:
            news = tuple(map(shaken, before(shaken(x))))
        else:
            whole = new(x, training=training, **added)
            with patched([(new, "activation", None)]):
                news = new(x, training=training, **added), whole
        results += [by_channel(axis, *pair) for pair in zip(olds, news, strict=True)]
    return results


# --- pattern and check ---------------------------------------------------------------------------


def _fusion(spot: Spot, *, known: bool) -> Fusion | str:
    """What can be taken in at a site, or why nothing can."""
    site = spot.call
    if site is None:
        return (
            "inside a layer whose call is not a graph" if known else "no graph shows what follows"
        )
    reason, follows = _unfit(site), site.only_consumer
    if reason or follows is None:
        takers = ", ".join(call.label() for call in site.consumers) or "nothing"
        return reason or f"its output goes to {takers}"
    relu = follows.only_consumer if is_sum(follows) else follows
    if relu is None or not is_activation(relu):
        return f"no ReLU follows, but {follows.label()}"
    total = follows if follows is not relu else None
    reason = _no_relu(relu) or (total and _no_sum(site, total))
    if reason is None:
        taken = [call for call in (total, relu) if call is not None]
        reason = next((why for call in taken if (why := _not_to_be_taken(site, call))), None)
    return reason or Fusion(site, total, relu)


def _unfit(site: Call) -> str | None:
    """Why a BatchNormalization takes nothing in; None if it may."""
    layer = site.operation
    if is_own_class(layer):
        return f"its class {type(layer).__name__} is a custom subclass"
    if getattr(layer, "activation", None) is not None:
        return "it has an activation of its own inside"
    if site.shared:
        return "it is called more than once"
    if layer.activity_regularizer is not None:
        return "it has an activity regularizer, which would see another output"
    return "its output is one of the model's" if site.is_output else None


def _no_relu(call: Call) -> str | None:
    """Why an activation is not max(0, x); None if it is."""
    operation, kinds = call.operation, operation_classes()
    if type(operation) is keras.layers.Activation:
        function = operation.activation
        if function is keras.activations.relu:
            return None
        return f"{call.label()} is {getattr(function, '__name__', function)}, not relu"
    if type(operation) not in (keras.layers.ReLU, kinds["relu"], kinds["activations.relu"]):
        return f"{call.label()} is no ReLU"
    for name, off in _PLAIN.items():
        if (value := getattr(operation, name, off)) != off:
            return f"{call.label()} has {name}={value}"
    return None


def _no_sum(site: Call, total: Call) -> str | None:
    """Why a sum is not the one of a residual block that this site takes in; None if it is."""
    if len(total.data) != 2 or total.producers[0] is total.producers[1]:
        return f"{total.label()} does not add two tensors"
    if len({*total.input_shapes}) > 1 or {*total.input_dtypes} != {site.operation.compute_dtype}:
        return f"{total.label()} adds tensors of several shapes or dtypes"
    if site.extras:
        return f"it is called with {', '.join(site.extras)}"
    if any(keras_mask(tensor) is not None for tensor in total.inputs):
        return f"{total.label()} makes one mask of several"
    last = [
        call
        for call in total.producers
        if call and is_site(call) and _unfit(call) is None and not call.extras
        if call.only_consumer is total
    ][-1]
    return None if last is site else f"{last.label()} takes {total.label()} in, and adds its output"


def _not_to_be_taken(site: Call, call: Call) -> str | None:
    """Why a sum or an activation has to stay where it is; None if it has not."""
    layer = call.operation
    if call.is_output:
        return f"{call.label()} is an output of the model, and must stay one"
    if call.shared:
        return f"{call.label()} is called more than once"
    if call.path.rpartition("/")[0] != site.path.rpartition("/")[0]:
        return f"{call.label()} is in another model"
    if isinstance(layer, keras.Layer) and layer.dtype_policy != site.operation.dtype_policy:
        return f"{call.label()} has another dtype policy"
    if getattr(layer, "activity_regularizer", None) is not None:
        return f"{call.label()} has an activity regularizer"
    return None


def _first(fusion: Fusion) -> bool:
    """Whether the sum takes the site's output first."""
    return fusion.total is not None and fusion.total.producers[0] is fusion.site


def _adding(fusion: Fusion) -> Any:
    """How the layer is called in the place of the sum."""
    training = {} if fusion.site.training is None else {"training": fusion.site.training}

    def call(layer: Any, value: Any, given: Mapping[str, Any]) -> Any:
        del value
        first, second = keras.tree.flatten([*given.values()])
        x, other = (first, second) if _first(fusion) else (second, first)
        return layer(x, add=other, **training)

    return call
