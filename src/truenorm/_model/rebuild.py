"""A new model made from an old one, with an edit.

A functional or Sequential model is made by running through its graph, with other layers in the
place of its own. A subclassed model, and the layers that no edit touches, are copied attribute by
attribute: their configs do not say all (what was adapted, quantised or set since, functions, what
they share).
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import keras

from truenorm._errors import ModelError
from truenorm._keras_internals import (
    compile_arguments,
    constructed_like,
    functional_class,
    layers_in,
    nodes,
    operation_like,
    operation_of,
    run_through_graph,
)
from truenorm._model.duplicate import Duplicator
from truenorm._model.edit import Edit, Piece, free_name, from_config, through
from truenorm._model.graph import graph_of
from truenorm._model.snapshot import same_randomness
from truenorm._model.state import carry_flags, carry_values, scope
from truenorm._model.trainer import compile_like


def rebuild(model: Any, edit: Edit | None = None) -> Any:
    """A new model with the edit made, and everything else as it was.

    Carried over: names, weights and all other state of the layers, ``trainable`` of every layer and
    of every variable, dtype policies, the arguments of every call, and the compile configuration
    (the optimizer and the metrics start anew; a model whose metrics cannot be made again comes back
    uncompiled). What layers share, they share in the new model too; the two models share no
    variable. The model given is not touched, nor are the global random generators.

    A model whose class has a constructor of its own, as KerasHub's backbones, keeps its class if
    nothing in it is edited; otherwise it becomes a ``keras.Model``, which the class cannot make.
    (It keeps it, too, if it has steps of its own and each edited layer has one in its place.) Where
    there is no graph, an edit can put one layer in the place of another, and nothing else.

    (One thing is Keras's to decide: in which order the calls of a shared layer are listed.)

    Raises:
        ModelError: A layer can be made again in no way, or the edit would cost the model the
            training step of its class.
    """
    with same_randomness(), _uncollected():
        builder = _Builder(model, edit or {})
        new = builder.counterpart(model)
        builder.carry()
        compile_like(model, new)
    return new


@contextmanager
def _uncollected() -> Generator[None]:
    """While open, Python does not look for garbage.

    What is made here lasts, and all of it would be looked through again and again while it grows.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Builder:
    """One rebuilding: what stands for every old layer, model and operation."""

    def __init__(self, root: Any, edit: Edit) -> None:
        self.root = root
        self.edit = edit
        self.pieces = [piece for chain in edit.values() for piece in chain]
        self.models: list[tuple[Any, Any]] = []
        self.copies = Duplicator(self.counterpart)
        self.made: dict[Any, Any] = {}

    def counterpart(self, old: Any) -> Any:
        """What stands for an old layer, model or operation; one and the same wherever it is."""
        if old in self.edit:  # inside another layer
            (piece,) = self.edit[old]
            build_like(old, piece.layer)
            return piece.layer
        if old not in self.made:
            self.made[old] = old  # until it is made, for what leads back to it
            self.made[old] = self._make(old)
        return self.made[old]

    def _make(self, old: Any) -> Any:
        if graph_of(old) is not None:
            make = self._sequential if isinstance(old, keras.Sequential) else self._functional
            self.models.append((old, make(old)))
            return self.models[-1][1]
        if not isinstance(old, keras.Layer):
            return operation_like(old, self.copies.value)
        if isinstance(old, keras.layers.TorchModuleWrapper):
            wrapper: Any = type(old)
            module = copy.deepcopy(old.module)
            new = wrapper(module, name=old.name, output_shape=old.output_shape)
        else:
            try:
                return self.copies.layer(old)
            except ModelError:  # it is bound to itself
                if not self.edit.keys().isdisjoint(layers_in(old)):  # it would make the old ones
                    raise
                new = from_config(old, type(old))
                build_like(old, new)
        self.pieces.append(Piece(new, old))
        return new

    def _functional(self, old: Any) -> Any:
        inputs = keras.tree.map_structure(self._new_input, old.input)
        outputs = run_through_graph(old, inputs, operation_fn=self._called, call_fn=self._call)
        outputs = self._outputs_like(old, outputs)
        return self._of_class(old, functional_class(), inputs, outputs)

    def _outputs_like(self, old: Any, outputs: Any) -> Any:
        """The outputs in their old dtypes and under their old names, where an edit has lost these.

        A layer that was moved keeps its own name; its output is named after what makes it now.
        """
        named: dict[Any, Any] = {}
        told = old is self.root and _tells_outputs_by_name(old)
        found: list[Any] = []
        taken = self._names_in_place_of(node.operation for node in nodes(old))
        for tensor, new in zip(old.outputs, keras.tree.flatten(outputs), strict=True):
            maker = operation_of(tensor)
            lost = told and maker.name not in taken
            if maker in self.edit and (lost or new.dtype != tensor.dtype):
                if maker not in named:
                    names = taken | {made.name for made in named.values()}
                    named[maker] = _keeper(maker.name, names, tensor.dtype)
                new = named[maker](new)
            found.append(new)
        return keras.tree.pack_sequence_as(outputs, found)

    def _names_in_place_of(self, operations: Iterable[Any]) -> set[str]:
        """The names of what stands in the place of operations."""
        names: set[str] = set()
        for one in operations:
            chain = self.edit.get(one)
            names |= {one.name} if chain is None else {piece.layer.name for piece in chain}
        return names

    def _sequential(self, old: Any) -> Any:
        chain = [self._new_input(old.inputs[0])]
        for layer in old.layers:
            pieces = self.edit.get(layer)
            chain += [self.counterpart(layer)] if pieces is None else [p.layer for p in pieces]
        if len(chain) == 1:  # nothing is left, and Keras calls no Sequential model without layers
            chain.append(keras.layers.Identity(name=f"{old.name}_identity"))
        last, end, dtype = old.layers[-1], chain[-1], old.outputs[0].dtype
        made = end.compute_dtype if graph_of(end) is None else end.outputs[0].dtype
        if last in self.edit and made != dtype:
            chain.append(_keeper(last.name, {one.name for one in chain}, dtype))
        return self._of_class(old, keras.Sequential, chain)

    def _of_class(self, old: Any, base: Any, *arguments: Any) -> Any:
        """A model of the old one's class, if it can be one; else of Keras's."""
        kind: Any = type(old)
        if _has_kerass_constructor(old):
            new = kind(*arguments, name=old.name)
        elif _parts(old).isdisjoint(self.edit) or (_steps_of_its_own(old) and self._one_for_one):
            new = kind.__new__(kind)
            base.__init__(new, *arguments, name=old.name)
            constructed_like(old, new, self.copies.value)
        elif old is self.root and _steps_of_its_own(old):
            raise _would_lose_steps(old)
        else:
            return base(*arguments, name=old.name)
        self.copies.fill(old, new)
        return new

    @cached_property
    def _one_for_one(self) -> bool:
        """Whether the edit puts one layer in the place of another, and nothing else."""
        return all(len(chain) == 1 for chain in self.edit.values())

    def _new_input(self, tensor: Any) -> Any:
        """A new input of the same specification and name."""
        layer = operation_of(tensor)
        config = getattr(layer, "get_config", dict)()
        known = {key: config[key] for key in ("sparse", "ragged", "optional") if key in config}
        name = config.get("name", tensor.name)
        new = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name, **known)
        self.made[layer] = operation_of(new)
        return new

    def _called(self, operation: Any) -> Any:
        """What is called in the place of an operation; of an edited one its chain, by ``_call``."""
        return operation if operation in self.edit else self.counterpart(operation)

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = cast(Any, keras.tree.map_structure(self._argument, (args, kwargs)))
        if operation in self.edit:
            return through(self.edit[operation], operation, args, kwargs)
        return operation(*args, **kwargs)

    def _argument(self, value: Any) -> Any:
        """A tensor as it is; a variable or a function as the new model has it."""
        return value if isinstance(value, keras.KerasTensor) else self.copies.value(value)

    def carry(self) -> None:
        """Give the new model the state of the old one."""
        layers, variables = [*self.models, *self.copies.layers], [*self.copies.variables]
        for old, new in self.models:
            new.dtype_policy = old.dtype_policy
        for piece in self.pieces:
            if isinstance(piece.source, keras.Layer):
                old, new, values = piece.source, piece.layer, piece.values
                carry_values(old, new, old.variables if values is None else values)
                # With values of its own it may lack an activation that was inside.
                layers += zip(layers_in(old), layers_in(new), strict=values is None)
                variables += _same_variables(piece)
        carry_flags(self.root, layers, variables)
        for piece in self.pieces:
            for variable in piece.layer.variables if piece.frozen else ():
                variable.trainable &= variable.name not in piece.frozen


def _keeper(name: str, taken: Collection[str], dtype: str) -> Any:
    """A layer that gives an output the dtype and, if it is free, the name that it had."""
    if name in taken:
        name = free_name(f"{name}_output", taken)
    return keras.layers.Identity(name=name, dtype=dtype)


def _same_variables(piece: Piece) -> Iterator[tuple[Any, Any]]:
    """The old variables of a piece and its own: with values of its own, those of the same name."""
    old, new = piece.source.variables, piece.layer.variables
    if piece.values is None:
        yield from zip(old, new, strict=True)
    else:
        named = {variable.name: variable for variable in old}
        yield from ((named[one.name], one) for one in new if one.name in named)


def build_like(old: Any, new: Any) -> None:
    """Build a layer as another one was, and under the same path."""
    if old.built and not new.built:
        with scope((old.path or old.name).split("/")[:-1]):
            new.build_from_config(old.get_build_config())


def _parts(model: Any) -> set[Any]:
    """All layers and operations in a model."""
    layers = layers_in(model)
    graphs = [graph_of(layer) for layer in layers if graph_of(layer) is not None]
    return {*layers, *(node.operation for graph in graphs for node in nodes(graph))}


def _tells_outputs_by_name(model: Any) -> bool:
    """Whether losses, metrics and targets may be told by the names of the outputs."""
    told = (compile_arguments(model) or {}).values()
    return len(model.outputs) > 1 or any(isinstance(value, dict) for value in told)


def _has_kerass_constructor(model: Any) -> bool:
    base = keras.Sequential if isinstance(model, keras.Sequential) else functional_class()
    return inspect.signature(type(model).__init__) == inspect.signature(base.__init__)


def _steps_of_its_own(model: Any) -> list[str]:
    """The parts of training that the user wrote."""
    steps = ("train_step", "test_step", "predict_step", "compute_loss", "compile")
    return [s for s in steps if getattr(type(model), s) is not getattr(keras.Model, s)]


def _would_lose_steps(model: Any) -> ModelError:
    step = _steps_of_its_own(model)[0]
    return ModelError(
        f"The class of this model has its own {step}, which a rewritten model would lose",
        where=model.name,
        expected="a constructor like that of keras.Model(inputs, outputs), or no own steps",
        received=type(model).__name__,
        remedy="work on keras.Model(model.inputs, model.outputs), and put the result back",
    )
