"""Compare old and new layers at each changed place of a model by itself, on random numbers.

The outputs of the whole model may hide a change: they may be the same for all inputs (a saturated
softmax), be NaN, or not depend on the place (a gate that is closed). So each place where the new
model computes something in another way is cut out, from the inputs of the first changed
call to where old and new must be equal again, and given standard normal numbers. Each channel is
compared with its own range, so that none hides behind a larger one.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from truenorm._keras_internals import filled_in
from truenorm._model.edit import Edit, through
from truenorm._model.graph import Call, Graph, Source, is_batch_normalization, layer_paths
from truenorm._model.hooks import patched
from truenorm._model.probe import run
from truenorm._model.sites import channel_axis, channel_axis_of
from truenorm._model.values import as_float64
from truenorm._records.moments import Array
from truenorm._rewrites.wrappers import innermost

_SAMPLES = 4
_LONGEST = (8, 64, sys.maxsize)
"""How long images and series are at most; more is tried where a kernel, or a layer that knows the
length, does not take it. A length that the model leaves open is 64 at most."""

_UNIT = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""One unit in the last place of the number 1."""


@dataclass(frozen=True)
class Place:
    """One place, a number per channel, in the units of its output.

    Args:
        path: Of its last call, where old and new must be equal.
        difference: The largest between old and new.
        extent: The largest minus the smallest value of the old.
    """

    path: str
    difference: Array
    extent: Array


def compared_places(
    graph: Graph, edit: Edit, between: Collection[Call], *, only_rounding: bool = False
) -> list[Place]:
    """Old and new at every changed place.

    A BatchNormalization inside another layer is a place by itself.

    Args:
        graph: Of the old model.
        edit: The chains that stand in the place of its layers, in the new model already.
        between: The calls whose output is meant to be another one in the new model.
        only_rounding: Compare the old not with the new but with itself, where the output of every
            call is moved by one unit in the last place.
    """
    changed = [call for call in graph.calls if _is_changed(call, edit, between)]
    layers = [call.operation for call in changed if isinstance(call.operation, keras.Layer)]
    layers += [piece.layer for layer in layers for piece in edit.get(layer, ())]
    compare = partial(_compare, changed, between, None if only_rounding else edit)
    hidden = {*edit} - {call.operation for call in graph.calls}
    paths = layer_paths(graph.model)
    pairs = {path: (k, edit[k][0].layer) for k, path in paths.items() if k in hidden}
    layers += [layer for pair in pairs.values() for layer in pair]
    # An activation inside would hide what is before it, as ReLU hides what is negative.
    inner = {innermost(layer) for layer in layers}
    with patched((k, "activation", None) for k in inner if is_batch_normalization(k)):
        found = _first_that_fits(compare, layers, changed, between)
        found += [_compare_layers(*pair, only_rounding=only_rounding) for pair in pairs.values()]
    ends = [call.path for call in changed if call not in between] + [*pairs]
    return [Place(path, *map(as_float64, pair)) for path, pair in zip(ends, found, strict=True)]


def _compare_layers(old: Any, new: Any, *, only_rounding: bool) -> Any:
    """Difference and extent of one BatchNormalization in the place of another, out of sight."""
    shape, axis = [_SAMPLES] * old.input_spec.ndim, channel_axis(old)
    shape[axis] = old.moving_mean.shape[-1]
    noise = np.random.default_rng(0).normal(size=shape).astype("float32")

    def compare(x: Any) -> Any:
        before = old(x, training=False)
        after = shaken(old(shaken(x), training=False)) if only_rounding else new(x, training=False)
        return by_channel(axis, before, after)

    return run(compare, [old, new], noise)


def _is_changed(call: Call, edit: Edit, between: Collection[Call]) -> bool:
    return call.operation in edit or not {call, *call.producers}.isdisjoint(between)


def _first_that_fits(
    compare: Any, layers: list[Any], changed: list[Call], between: Collection[Call]
) -> list[Any]:
    for longest in _LONGEST[:-1]:
        try:
            return run(compare, layers, _noise(changed, between, longest))
        except Exception:  # noqa: S112 - what a layer raises that does not take it is its own
            continue
    return run(compare, layers, _noise(changed, between, _LONGEST[-1]))


def _noise(changed: list[Call], between: Collection[Call], longest: int) -> dict[str, Any]:
    """Random numbers for all tensors that come into the places from outside."""
    generator, made = np.random.default_rng(0), dict[str, Any]()
    for call in changed:
        for tensor, source in zip(call.node.input_tensors, call.sources, strict=True):
            if source.call not in between and _name(source) not in made:
                rank = len(tensor.shape)
                shape = [min(d or 64, longest) for d in tensor.shape]
                shape[0], axis = tensor.shape[0] or _SAMPLES, _axis(call, rank)
                if axis < rank:  # a mask may have none
                    shape[axis] = tensor.shape[axis] or 64
                drawn = generator.normal(size=shape).astype("float32")
                is_float = keras.backend.is_float_dtype(tensor.dtype)
                made[_name(source)] = drawn if is_float else abs(10 * drawn).astype(tensor.dtype)
    return made


def _axis(call: Call, rank: int) -> int:
    """Along which axis of its tensors the channels of a call are."""
    layer = call.operation
    if is_batch_normalization(layer):
        return channel_axis(layer)
    return channel_axis_of(layer, rank)


def _name(source: Source) -> str:
    return f"{'' if source.call is None else source.call.path}:{source.number}"


def _compare(
    changed: list[Call], between: Collection[Call], edit: Edit | None, noise: dict[str, Any]
) -> list[Any]:
    """Difference and extent of every place; without an edit the old is compared with itself."""
    inside: dict[Source, tuple[Any, Any]] = {}
    found: list[Any] = []
    for call in changed:
        pairs = [inside.get(k) or (noise[_name(k)], noise[_name(k)]) for k in call.sources]
        olds, news = [old for old, _ in pairs], [new for _, new in pairs]
        old = _called(call, {}, olds)
        new = _called(call, {}, shaken(news)) if edit is None else _called(call, edit, news)
        new = shaken(new) if edit is None else new
        if call in between:
            both = zip(keras.tree.flatten(old), keras.tree.flatten(new), strict=True)
            inside |= {Source(call, number): pair for number, pair in enumerate(both)}
        else:
            found.append(by_channel(_axis(call, len(old.shape)), old, new))
    return found


def _called(call: Call, edit: Edit, inputs: list[Any]) -> Any:
    """What a call makes of other inputs, with the chain that stands in the place of its layer."""
    args, kwargs = filled_in(call.node, inputs)
    if call.written is not None and isinstance(call.operation, keras.Layer):
        kwargs["training"] = call.written[1]
    operation = call.operation
    # A piece that does not stand for the operation is an activation that was inside, or a sum.
    chain = [p for p in edit.get(operation, ()) if p.source is operation or p.call is not None]
    if operation in edit:
        return through(chain, operation, args, kwargs)
    return operation(*args, **kwargs)


def shaken(tensors: Any) -> Any:
    """Numbers moved by one unit in the last place, up or down without a pattern."""

    def shake(x: Any) -> Any:
        x = keras.ops.convert_to_tensor(x)
        unit = _UNIT.get(keras.backend.standardize_dtype(x.dtype))
        if unit is None:
            return x
        signs = np.sign(np.sin(np.arange(np.prod(x.shape)))).reshape(x.shape)
        return x + unit * x * keras.ops.cast(signs, x.dtype)

    return keras.tree.map_structure(shake, tensors)


def by_channel(axis: int, old: Any, new: Any) -> tuple[Any, Any]:
    others = [one for one in range(len(old.shape)) if one != axis]
    if keras.backend.standardize_dtype(old.dtype) != "float64":
        old, new = keras.ops.cast(old, "float32"), keras.ops.cast(new, "float32")
    both_nan = keras.ops.logical_and(keras.ops.isnan(old), keras.ops.isnan(new))
    same = keras.ops.logical_or(keras.ops.equal(old, new), both_nan)
    difference = keras.ops.where(same, 0.0, keras.ops.abs(keras.ops.subtract(old, new)))
    difference = keras.ops.where(keras.ops.isnan(difference), np.inf, difference)
    largest, smallest = keras.ops.max(old, axis=others), keras.ops.min(old, axis=others)
    extent = keras.ops.subtract(largest, smallest)
    if all(old.shape[one] == 1 for one in others):  # one value has no range but its own size
        extent = keras.ops.abs(largest)
    return keras.ops.max(difference, axis=others), extent
