"""A Keras model as a flat list of calls, and its rebuilding with an edit.

Two ideas carry all the rewrites:

- **calls**: a functional or Sequential model, nested ones entered, is the list of its leaf calls in
  the order in which they run, each linked to the calls that make its inputs and take its output.
- **edit**: a mapping from a layer to the *chain* of pieces that stands in its place. An empty chain
  removes the layer, two pieces insert one, a piece of another class replaces it. Moving a
  BatchNormalization behind its activation is ``{bn: [], activation: [activation, bn]}``.

This is the only file that reads Keras's graph attributes, some of which are not public.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from truenorm._errors import ModelError


@dataclass(eq=False)
class Call:
    """One call of one layer or operation in a model's graph.

    Args:
        path: Names of the enclosing models and of the layer, joined by ``/``; the second and later
            calls of a shared layer end in ``#2``, ``#3``…
        operation: The layer, or the ``keras.ops`` operation.
        training: The ``training`` value written into the graph at this call, if any.
        producers: The calls that make its inputs; None stands for an input of the model.
        consumers: The calls that take its output.
        is_output: Whether its output is one of the model's outputs.
    """

    path: str
    operation: Any
    training: bool | None
    producers: tuple[Call | None, ...]
    consumers: list[Call] = field(default_factory=list["Call"])
    is_output: bool = False

    @property
    def only_consumer(self) -> Call | None:
        """The single call that takes the output, or None if there are more, or it is an output."""
        return self.consumers[0] if len(self.consumers) == 1 and not self.is_output else None

    @property
    def only_producer(self) -> Call | None:
        """The single call that makes the input, or None."""
        return self.producers[0] if len(self.producers) == 1 else None

    def label(self) -> str:
        """Class and name, for tables and messages."""
        return f"{type(self.operation).__name__} {self.operation.name}"


def graph_of(model: Any) -> Any | None:
    """The functional graph of a functional or built Sequential model; None for anything else."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None)
    is_graph = isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth")
    own_call = is_graph and type(model).call is not _FUNCTIONAL_CALL
    return None if own_call or not is_graph else model


def _functional_call() -> Any:
    source = keras.Input((1,))
    return type(keras.Model(source, source)).call


_FUNCTIONAL_CALL = _functional_call()


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


def calls(model: Any) -> list[Call]:
    """Every leaf call of the model in the order of execution, nested models entered."""
    require_graph(model)
    found: list[Call] = []
    seen: dict[str, int] = {}
    for source in _run(graph_of(model), [None] * len(model.inputs), "", found, seen):
        if source is not None:
            source.is_output = True
    return found


def _run(
    graph: Any,
    inputs: Sequence[Call | None],
    prefix: str,
    found: list[Call],
    seen: dict[str, int],
) -> list[Call | None]:
    source_of: dict[int, Call | None] = {
        id(tensor): source for tensor, source in zip(graph.inputs, inputs, strict=True)
    }
    for node in _nodes(graph):
        operation = node.operation
        if any(id(t) not in source_of for t in node.input_tensors):
            continue  # not reachable from the inputs: Keras skips such nodes too
        sources = [source_of[id(t)] for t in node.input_tensors]
        inner = graph_of(operation)
        if inner is not None:
            made = _run(inner, sources, f"{prefix}{operation.name}/", found, seen)
        else:
            path = prefix + operation.name
            seen[path] = seen.get(path, 0) + 1
            if seen[path] > 1:
                path = f"{path}#{seen[path]}"
            call = Call(path, operation, node.arguments.kwargs.get("training"), tuple(sources))
            for source in dict.fromkeys(s for s in sources if s is not None):
                source.consumers.append(call)
            found.append(call)
            made = [call] * len(node.outputs)
        source_of.update({id(t): s for t, s in zip(node.outputs, made, strict=True)})
    return [source_of[id(t)] for t in graph.outputs]


def _nodes(graph: Any) -> Iterator[Any]:
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.operation is not None and not node.is_input:
                yield node


def layer_paths(model: Any) -> dict[Any, str]:
    """Path of every leaf layer of any model, subclassed ones too, by walking what they contain."""
    paths: dict[Any, str] = {}

    def walk(layer: Any, prefix: str) -> None:
        for child in layer._flatten_layers(include_self=False, recursive=False):
            if graph_of(layer) is child:  # a Sequential's own functional twin
                walk(child, prefix)
                continue
            path = prefix + child.name
            if child not in paths:
                paths[child] = path
                walk(child, path + "/")

    walk(model, "")
    return paths


def is_batch_normalization(layer: Any) -> bool:
    """Whether this is a BatchNormalization: Keras's, ours or a user's subclass."""
    return isinstance(layer, keras.layers.BatchNormalization)


# --- rebuilding --------------------------------------------------------------------------------


@dataclass(eq=False)
class Piece:
    """A new layer for the new model, and the values that its variables shall have.

    Args:
        layer: A layer that is not called anywhere yet.
        values: One array per variable of the layer, in Keras's order.
        source: The layer of the old model that it stands for: it is called with that one's
            arguments (``training``, ``mask``), and has its ``trainable``.
    """

    layer: Any
    values: Sequence[Any]
    source: Any = None


Edit = Mapping[Any, Sequence[Piece]]


def copy_of(layer: Any, values: Sequence[Any] | None = None, **changes: Any) -> Piece:
    """A copy of a layer with its values; ``changes`` go over its config."""
    config = {**layer.get_config(), **changes}
    return Piece(
        type(layer).from_config(config), layer.variables if values is None else values, layer
    )


def rebuild(model: Any, edit: Edit | None = None) -> Any:
    """A new model with the edit made, and everything else as it was.

    (One thing is Keras's to decide: in which order the calls of a shared layer are listed.)

    Carried over: names, weights and all other variables, ``trainable`` of every layer, the
    arguments of every call, and the compile configuration (the optimizer starts anew). The model
    given is not touched.
    """
    require_graph(model)
    builder = _Builder(edit or {})
    new = builder.counterpart(model)
    builder.finish()
    if model.compiled:
        new.compile_from_config(model.get_compile_config())
    return new


class _Builder:
    """One rebuilding: which new layer stands for which old one, and what is to be filled in."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.made: dict[Any, Any] = {}
        self.pieces = [piece for chain in edit.values() for piece in chain]

    def counterpart(self, operation: Any) -> Any:
        """What stands for an old layer, model or operation; one and the same for all its calls."""
        if operation in self.edit:
            return operation  # a marker: it is called through its chain
        if operation not in self.made:
            self.made[operation] = self._build(operation)
        return self.made[operation]

    def _build(self, operation: Any) -> Any:
        if graph_of(operation) is not None:
            build = (
                self._sequential if isinstance(operation, keras.Sequential) else self._functional
            )
            piece = Piece(build(operation), (), operation)
        elif isinstance(operation, keras.Layer):
            piece = copy_of(operation)
        else:
            return type(operation).from_config(operation.get_config())
        self.pieces.append(piece)
        return piece.layer

    def _functional(self, model: Any) -> Any:
        return keras.models.clone_model(
            model,
            input_tensors=keras.tree.map_structure(_new_input, model.input),
            clone_function=self.counterpart,
            call_function=self._call,
        )

    def _sequential(self, model: Any) -> Any:
        chain = [_new_input(model.inputs[0])]
        for layer in model.layers:
            pieces = self.edit.get(layer)
            chain += [self.counterpart(layer)] if pieces is None else [p.layer for p in pieces]
        return keras.Sequential(chain, name=model.name)

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        if operation not in self.edit:
            return operation(*args, **kwargs)
        value = given = args[0] if args else next(iter(kwargs.values()))
        for piece in self.edit[operation]:
            if piece.source is operation and value is given:
                value = piece.layer(*args, **kwargs)
            else:
                value = piece.layer(value)
        return value

    def finish(self) -> None:
        """Set ``trainable`` and the values; outer models first, since theirs spreads inward."""
        for piece in reversed(self.pieces):
            if piece.source is not None:
                piece.layer.trainable = piece.source.trainable
        for piece in self.pieces:
            _fill(piece)


def _new_input(tensor: Any) -> Any:
    """A new input of the same specification and, as clone_model would not, the same name."""
    config = getattr(tensor._keras_history.operation, "get_config", dict)()
    known = {key: config[key] for key in ("sparse", "ragged", "optional") if key in config}
    name = config.get("name", tensor.name)
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name, **known)


def _fill(piece: Piece) -> None:
    if not piece.values:
        return
    variables = piece.layer.variables
    shapes = [tuple(v.shape) for v in variables]
    wanted = [tuple(v.shape) for v in piece.values]
    if shapes != wanted:
        raise ModelError(
            "This layer cannot be rebuilt from its config: the copy has other variables",
            where=piece.layer.name,
            expected=f"variables of shapes {wanted}",
            received=f"{shapes}",
            remedy="remove quantisation or LoRA from the layer first, or complete its get_config()",
        )
    for variable, value in zip(variables, piece.values, strict=True):
        variable.assign(numbers(value))


def numbers(variable: Any) -> np.ndarray[Any, Any]:
    """The numbers of a variable or tensor, in memory of their own.

    A shared buffer would change with the variable on torch, and be lost on JAX, which gives a
    variable's buffer away in a training step.
    """
    return np.array(keras.ops.convert_to_numpy(variable))
