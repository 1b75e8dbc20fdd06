"""Inputs made from a model's own specification, and its outputs on inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from truenorm._errors import DataError
from truenorm._keras_internals import layers_in
from truenorm._kernels.sums import compiled
from truenorm._model.graph import (
    Call,
    Graph,
    Source,
    graph_of,
    input_specification,
    nearby,
    read_graph,
)
from truenorm._model.values import as_float64

_SIZES = (32, 64, 96, 128, 224, 299)


def make_inputs(model: Any, samples: int = 4) -> Any:
    """Inputs of the model's own structure, made from its input specification.

    Floats are standard normal with a fixed seed. Integers and strings are of the vocabulary of the
    layer that takes them (an embedding's indices, the tokens of a lookup), else 0 or 1, or letters.
    A dimension that the model leaves open gets the least of a few common sizes for which all shapes
    work out.
    """
    generator = np.random.default_rng(0)
    specification = input_specification(model)
    graph = None if graph_of(model) is None else read_graph(model)

    def shape_of(spec: Any, size: int) -> tuple[int, ...]:
        return (spec.shape[0] or samples, *(d or size for d in spec.shape[1:]))

    def make(spec: Any, number: int) -> Any:
        shape = shape_of(spec, size)
        if keras.backend.is_float_dtype(spec.dtype):
            return generator.normal(size=shape).astype("float32")
        text = spec.dtype == "string"
        known = None if graph is None else _vocabulary(graph, number)
        return generator.choice(known or (["a", "b"] if text else [0, 1]), shape).astype(
            "str" if text else spec.dtype
        )

    size = _SIZES[0]
    for size in _SIZES if any(None in t.shape[1:] for t in model.inputs) else ():
        shapes = keras.tree.map_structure(lambda t, s=size: shape_of(t, s), specification)
        with contextlib.suppress(ValueError, RuntimeError):  # too small for the model's strides
            model.compute_output_shape(shapes)
            break
    flat = [make(spec, number) for number, spec in enumerate(keras.tree.flatten(specification))]
    return keras.tree.pack_sequence_as(specification, flat)


def _vocabulary(graph: Graph, number: int) -> list[Any] | None:
    """What an input of the model may be; None if no layer says it."""
    known = [_tokens_of(call.operation) for call in _takers(graph, number)]
    return min((tokens for tokens in known if tokens), key=len, default=None)


def _takers(graph: Graph, number: int) -> Iterator[Call]:
    """The calls that an input reaches before anything has made floating numbers of it."""
    for call in graph.calls:
        if Source(None, number) in call.sources:
            yield call
            if not _makes_floats(call):
                yield from nearby(call, back=False, stop=_makes_floats)


def _makes_floats(call: Call) -> bool:
    return keras.backend.is_float_dtype(call.node.outputs[0].dtype)


def _tokens_of(layer: Any) -> list[Any] | None:
    """The integers or strings that a layer knows as its input."""
    if isinstance(layer, keras.layers.Embedding):
        return list(range(layer.input_dim))
    if isinstance(layer, keras.layers.CategoryEncoding):
        return list(range(layer.num_tokens or 0))
    if isinstance(
        layer,
        keras.layers.IntegerLookup | keras.layers.StringLookup | keras.layers.TextVectorization,
    ):
        return layer.get_vocabulary(include_special_tokens=False)
    return None


def outputs(model: Any, inputs: Any) -> list[np.ndarray[Any, Any]]:
    """The model's outputs in inference mode, as float64 arrays."""
    try:
        made = run(lambda inputs: model(inputs, training=False), [model], inputs)
    except Exception as error:  # each framework has its own for what is out of range
        raise DataError(
            "The model does not take this input",
            expected=str(
                keras.tree.map_structure(lambda t: tuple(t.shape), input_specification(model))
            ),
            received=str(keras.tree.map_structure(np.shape, inputs)),
            remedy="give data of the model's input shape",
        ) from error
    return [as_float64(y) for y in keras.tree.flatten(made)]


def run(function: Callable[[Any], Any], layers: Sequence[Any], inputs: Any) -> Any:
    """What a function makes of inputs with some layers, in which nothing changes."""
    variables = [*{id(v): v for layer in layers for v in layer.variables}.values()]

    def program(state: list[Any], inputs: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, state, strict=True))):
            return function(inputs)

    # As one program on JAX, which else compiles every operation by itself: five times slower.
    jit = keras.config.backend() == "jax" and all(
        getattr(one, "supports_jit", True) for layer in layers for one in layers_in(layer)
    )
    state = [keras.ops.convert_to_tensor(variable) for variable in variables]
    try:
        return compiled(program, jit)(state, inputs)
    except Exception:  # what a model may do in a call() of its own is not known
        return program(state, inputs)
