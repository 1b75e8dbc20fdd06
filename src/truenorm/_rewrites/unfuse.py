"""Put the sum and the activation that a layer does behind its normalisation there as layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras

from truenorm._keras_internals import layers_in
from truenorm._model.edit import Edit, Piece, activation_of, free_name, through
from truenorm._model.hooks import patched
from truenorm._model.probe import run
from truenorm._model.sites import channel_axis, spots
from truenorm._model.values import as_float64
from truenorm._rewrites.fuse import PLAIN_BATCHES, noise_for
from truenorm._rewrites.passing import has_activation
from truenorm._rewrites.verify_places import Place, by_channel, shaken


def names_in(model: Any) -> set[str]:
    """The names that a new layer of the model cannot have."""
    layers = {layer.name for layer in layers_in(model)}
    return layers | {tensor.name for tensor in getattr(model, "inputs", None) or ()}


def adding_layers(model: Any) -> set[Any]:
    """The layers that are called with a tensor to add."""
    return {spot.layer for spot in spots(model) if spot.call and "add" in spot.call.extras}


def behind(layer: Any, names: set[str], *, adds: bool) -> list[Piece]:
    """What a layer does behind its normalisation, as layers; their names are added to ``names``."""
    pieces: list[Piece] = []
    if adds:
        total = keras.layers.Add(name=_new(f"{layer.name}_add", names), dtype=layer.dtype_policy)
        pieces.append(Piece(total, call=_with_added))
    if has_activation(layer):
        pieces.append(activation_of(layer, _new(f"{layer.name}_activation", names)))
    return pieces


def compared_unfused(
    edit: Edit, adding: Collection[Any], *, only_rounding: bool = False
) -> list[Place]:
    """Layers and the chains in their place, on random numbers, in training and in inference.

    Args:
        edit: The chains in the place of layers.
        adding: The layers that are called with a tensor to add.
        only_rounding: Compare the old not with the new but with itself, where each number that
            comes in or out is moved by one unit in the last place.
    """
    old = [layer for layer, chain in edit.items() if len(chain) > 1]
    layers = [*old, *(piece.layer for layer in old for piece in edit[layer])]
    drawn = [noise_for(layer) for layer in old]

    def compare(drawn: Any) -> Any:
        return [
            _compare(layer, None if only_rounding else edit[layer], x, other, layer in adding)
            for layer, (x, other) in zip(old, drawn, strict=True)
        ]

    normalizing = [*old, *(edit[layer][0].layer for layer in old)]
    with patched((layer, *option) for layer in normalizing for option in PLAIN_BATCHES.items()):
        compared = run(compare, layers, drawn)
    return [
        Place(layer.path, as_float64(difference), as_float64(extent))
        for layer, results in zip(old, compared, strict=True)
        for difference, extent in results
    ]


def _compare(
    layer: Any, chain: Sequence[Piece] | None, x: Any, other: Any, adds: bool
) -> list[Any]:
    """Before the activation, which may hide what is negative, and behind it."""
    results: list[Any] = []
    for training in (False, True):  # which moves the statistics
        given = {"training": training} | ({"add": other} if adds else {})

        def pair(
            chain: Sequence[Piece] | None, given: Mapping[str, Any] = given
        ) -> tuple[Any, Any]:
            if chain is None:
                return layer(x, **given), shaken(layer(shaken(x), **given))
            return layer(x, **given), through(chain, layer, (x,), given)

        whole = pair(chain)
        with patched([(layer, "activation", None)]):
            bare = pair(chain and [p for p in chain if p.source is layer or p.call is not None])
        results += [by_channel(channel_axis(layer), *both) for both in (bare, whole)]
    return results


def _with_added(layer: Any, value: Any, given: Mapping[str, Any]) -> Any:
    return layer([value, given["add"]]) if given.get("add") is not None else value


def _new(name: str, names: set[str]) -> str:
    name = free_name(name, names)
    names.add(name)
    return name
