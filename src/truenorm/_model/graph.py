"""A Keras model as a flat list of calls: what runs, in which order, what feeds what.

A functional or Sequential model, nested ones entered, is the list of its leaf calls, each linked to
the calls that make its inputs and to those that take its output.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import keras

from truenorm._errors import ModelError
from truenorm._keras_internals import functional_class, functional_twin, layers_in, nodes


class Source(NamedTuple):
    """Where a tensor comes from: an output of a call, or an input of the model, and which one."""

    call: Call | None
    number: int


@dataclass(eq=False)
class Call:
    """One call of one layer or operation in a model's graph.

    Args:
        path: Names of the enclosing models and of the layer, joined by ``/``; the second and later
            calls of a shared layer end in ``#2``, ``#3``…
        operation: The layer, or the ``keras.ops`` operation.
        node: Keras's own record of the call: its arguments and its symbolic outputs.
        training: The ``training`` value written into the graph at this call, if any.
        inherited: Path of the nearest enclosing model whose call has a ``training`` value written
            into the graph, and that value; None if there is none.
        extras: Names of the arguments written there besides the first and ``training``: ``mask``
            for one.
        sources: Where its tensors come from.
        data: Which of them are no mask, nor what a BatchNormalization adds, counted from 0.
        consumers: The calls that take its output.
        is_output: Whether its output is one of the model's outputs.
        shared: Whether the layer is called more than once in the model, or is inside another layer
            too.
    """

    path: str
    operation: Any
    node: Any = field(repr=False)
    training: bool | None
    inherited: tuple[str, bool] | None
    extras: tuple[str, ...]
    sources: tuple[Source, ...] = field(repr=False)
    data: tuple[int, ...] = field(repr=False)
    consumers: list[Call] = field(default_factory=list["Call"], repr=False)
    is_output: bool = False
    shared: bool = False

    @property
    def producers(self) -> tuple[Call | None, ...]:
        """The calls that make its inputs, masks aside; None stands for an input of the model."""
        return tuple(self.sources[number].call for number in self.data)

    @property
    def aside(self) -> tuple[Call | None, ...]:
        """The calls that make its mask, or what it adds."""
        others = set(range(len(self.sources))) - set(self.data)
        return tuple(self.sources[number].call for number in others)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Its symbolic inputs, masks aside."""
        return tuple(self.node.input_tensors[number] for number in self.data)

    @property
    def input_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """Their shapes, batch axis first; None is a length that is not fixed."""
        return tuple(tuple(tensor.shape) for tensor in self.inputs)

    @property
    def input_dtypes(self) -> tuple[str, ...]:
        """Their dtypes."""
        return tuple(str(tensor.dtype) for tensor in self.inputs)

    @property
    def constants(self) -> list[str]:
        """What it is given besides tensors, as text."""
        given = keras.tree.flatten([list(self.node.arguments.args), self.node.arguments.kwargs])
        return [repr(value) for value in given if not isinstance(value, keras.KerasTensor)]

    @property
    def written(self) -> tuple[str, bool] | None:
        """The ``training`` value written into the graph for this call, and at which path."""
        return self.inherited if self.training is None else (self.path, self.training)

    @property
    def only_consumer(self) -> Call | None:
        """The single call that takes the output, or None if there are more, or it is an output."""
        return self.consumers[0] if len(self.consumers) == 1 and not self.is_output else None

    @property
    def only_producer(self) -> Call | None:
        """The single call that makes the input, or None."""
        return self.producers[0] if len(self.data) == 1 else None

    def label(self) -> str:
        """Class and name, for tables and messages."""
        return label_of(self.operation)


def label_of(operation: Any) -> str:
    """Class and name of a layer or operation."""
    return f"{type(operation).__name__} {operation.name}"


@dataclass(frozen=True, eq=False)
class Graph:
    """The calls of a functional or built Sequential model.

    Args:
        model: The model.
        calls: Every leaf call in the order of execution, nested models entered (of a subclassed
            model none).
    """

    model: Any
    calls: tuple[Call, ...]

    @cached_property
    def sites(self) -> tuple[Call, ...]:
        """The calls that are a BatchNormalization."""
        return tuple(call for call in self.calls if is_batch_normalization(call.operation))

    @property
    def labels(self) -> set[str]:
        """How its layers and operations are called in messages."""
        return {call.label() for call in self.calls}


def graph_of(model: Any) -> Any | None:
    """The functional graph of a functional or built Sequential model; None for anything else."""
    if isinstance(model, keras.Sequential):
        return functional_twin(model)
    if not isinstance(model, functional_class()):
        return None
    # A subclass of a functional model may do something else in a call() of its own.
    return model if type(model).call is functional_class().call else None


def require_graph(model: Any) -> None:
    """Refuse what is not a functional or built Sequential model, with the reason."""
    if graph_of(model) is not None:
        return
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, keras.Sequential):
        problem, remedy = "This Sequential model has no input shape yet", "build it first"
    elif isinstance(model, keras.Model):
        problem = "This model is subclassed: what its call() does cannot be read or rewritten"
        remedy = "give the functional part of it, or rewrite it with the functional API"
    else:
        problem, remedy = "This is not a Keras model", "give a keras.Model"
    raise ModelError(
        problem, expected="a functional or built Sequential model", received=kind, remedy=remedy
    )


def input_specification(model: Any) -> Any:
    """The symbolic inputs of such a model, in the structure that its call takes."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def read_graph(model: Any) -> Graph:
    """Read the calls of a functional or built Sequential model."""
    require_graph(model)
    found: list[Call] = []
    inputs = [Source(None, number) for number in range(len(model.inputs))]
    for source in _run(graph_of(model), inputs, "", None, found, Counter()):
        if source.call is not None:
            source.call.is_output = True
    times = Counter(call.operation for call in found)
    layers = [one for one in times if isinstance(one, keras.Layer)]
    times.update(inner for layer in layers for inner in layers_in(layer, itself=False))
    for call in found:
        call.shared = times[call.operation] > 1
    return Graph(model, tuple(found))


def calls(model: Any) -> list[Call]:
    """Every leaf call of the model in the order of execution, nested models entered."""
    return list(read_graph(model).calls)


def _run(
    graph: Any,
    inputs: Sequence[Source],
    prefix: str,
    inherited: tuple[str, bool] | None,
    found: list[Call],
    times: Counter[str],
) -> list[Source]:
    """Add the calls of one model to those found; where its outputs come from."""
    source_of = {id(tensor): source for tensor, source in zip(graph.inputs, inputs, strict=True)}
    for node in nodes(graph):
        operation = node.operation
        if any(id(t) not in source_of for t in node.input_tensors):
            continue  # not reachable from the inputs: Keras skips such nodes too
        sources = [source_of[id(t)] for t in node.input_tensors]
        given = _given(node)
        aside = [given.get("mask"), given.get("add") if is_batch_normalization(operation) else None]
        aside = {id(tensor) for tensor in keras.tree.flatten(aside)}
        aside -= {id(tensor) for tensor in keras.tree.flatten([*given.values()][:1])}
        data = tuple(n for n, t in enumerate(node.input_tensors) if id(t) not in aside)
        training = given.pop("training", None)
        path = prefix + operation.name
        inner = graph_of(operation)
        if inner is not None:
            below = inherited if training is None else (path, training)
            made = _run(inner, [sources[n] for n in data], f"{path}/", below, found, times)
        else:
            times[path] += 1
            if times[path] > 1:
                path = f"{path}#{times[path]}"
            extras = tuple(given)[1:]
            call = Call(path, operation, node, training, inherited, extras, tuple(sources), data)
            for producer in dict.fromkeys(source.call for source in sources if source.call):
                producer.consumers.append(call)
            found.append(call)
            made = [Source(call, number) for number in range(len(node.outputs))]
        source_of.update({id(t): s for t, s in zip(node.outputs, made, strict=True)})
    return [source_of[id(t)] for t in graph.outputs]


def _given(node: Any) -> dict[str, Any]:
    """The arguments of a call by their names, those that are None left out."""
    names = inspect.signature(node.operation.call).parameters
    named = dict(zip(names, node.arguments.args, strict=False)) | node.arguments.kwargs
    return {name: value for name, value in named.items() if value is not None}


def nearby(
    call: Call, *, back: bool = True, stop: Callable[[Call], bool] = lambda _: False
) -> Iterator[Call]:
    """Every call before (or after) this one, the nearest first; none beyond one that stops."""
    queue, seen = [call], {id(call)}
    while queue:
        one = queue.pop(0)
        for other in one.producers if back else one.consumers:
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                yield other
                if not stop(other):
                    queue.append(other)


def is_site(call: Call) -> bool:
    """Whether this call is a BatchNormalization."""
    return is_batch_normalization(call.operation)


def layer_paths(model: Any) -> dict[Any, str]:
    """Path of every leaf layer of any model, subclassed ones too, by walking what they contain.

    Keras lets layers of a subclassed model share a name: the second gets ``#2``, and so on.
    """
    paths: dict[Any, str] = {}
    taken: Counter[str] = Counter()

    def walk(layer: Any, prefix: str) -> None:
        for child in layers_in(layer, itself=False, nested=False):
            if graph_of(layer) is child:  # a Sequential's own functional twin
                walk(child, prefix)
            elif child not in paths:
                path = prefix + child.name
                taken[path] += 1
                paths[child] = path if taken[path] == 1 else f"{path}#{taken[path]}"
                walk(child, paths[child] + "/")

    walk(model, "")
    return paths


def parents_in(model: Any) -> dict[Any, list[Any]]:
    """What each layer is inside of, from the outermost: the model itself, and what nests there."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for parent in layers_in(model):
        for layer in layers_in(parent, itself=False):
            found[layer].append(parent)
    return found


def is_batch_normalization(layer: Any) -> bool:
    """Whether this is a BatchNormalization: Keras's, ours or a user's subclass."""
    return isinstance(layer, keras.layers.BatchNormalization)
