"""A new model made from an old one, with an edit.

An *edit* maps a layer to the *chain* of pieces that stands in its place: an empty chain removes the
layer, two pieces insert one, a piece of another class replaces it. Moving a BatchNormalization
behind its activation is ``{bn: [], activation: [activation, bn]}``. All rewrites are edits.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from truenorm._errors import ModelError
from truenorm._keras_internals import functional_class, layers_in, operation_of, run_through_graph
from truenorm._model.graph import calls, graph_of, require_graph
from truenorm._model.snapshot import same_randomness
from truenorm._model.trainer import compile_like
from truenorm._model.values import numbers


@dataclass(eq=False)
class Piece:
    """A new layer for the new model, and what it shall be.

    Args:
        layer: A layer that is not called anywhere yet.
        source: The layer of the old model that it stands for, whose state it gets; None for a
            layer that has no forerunner. An operation that is not a layer has no state.
        values: One array per variable, in Keras's order, where they are not the source's.
        arguments: What it is called with besides its input. In the place of its own source it is
            called with all that the source was called with.
    """

    layer: Any
    source: Any = None
    values: Sequence[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])


Edit = Mapping[Any, Sequence[Piece]]


def copy_of(
    layer: Any,
    values: Sequence[Any] | None = None,
    *,
    training: bool | None = None,
    **changes: Any,
) -> Piece:
    """A copy of a layer; ``changes`` go over its config, ``training`` into its call."""
    try:
        new = type(layer).from_config({**layer.get_config(), **changes})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"This {type(layer).__name__} cannot be made again from its config",
            where=layer.name,
            received=str(error).strip().splitlines()[0],
            remedy="give its class a complete get_config(); a Lambda has to become a layer",
        ) from error
    if isinstance(layer, keras.Layer) and new.dtype_policy != layer.dtype_policy:
        new.dtype_policy = layer.dtype_policy  # SpatialDropout's config, for one, has half of it
    return Piece(new, layer, values, {} if training is None else {"training": training})


def rebuild(model: Any, edit: Edit | None = None) -> Any:
    """A new model with the edit made, and everything else as it was.

    Carried over: names, weights and all other state of the layers, ``trainable`` of every layer,
    dtype policies, the arguments of every call, and the compile configuration (the optimizer and
    the metrics start anew; a model whose metrics cannot be made again comes back uncompiled). The
    model given is not touched, nor are the global random generators.

    A model whose class has a constructor of its own, as KerasHub's backbones, keeps its class if
    nothing in it is edited; otherwise it becomes a ``keras.Model``, which the class cannot make.

    (One thing is Keras's to decide: in which order the calls of a shared layer are listed.)

    Raises:
        ModelError: The model is not a graph, a layer cannot be made again, or the model's class
            has a training step of its own and a constructor that is not Keras's.
    """
    require_graph(model)
    _require_class(model)
    with same_randomness():
        builder = _Builder(model, edit or {})
        new = builder.counterpart(model)
        builder.finish()
        compile_like(model, new)
    return new


class _Builder:
    """One rebuilding: which new layer stands for which old one, and what is to be filled in."""

    def __init__(self, root: Any, edit: Edit) -> None:
        self.root = root
        self.edit = edit
        self.made: dict[Any, Any] = {}
        self.pieces = [piece for chain in edit.values() for piece in chain]
        self.models: list[tuple[Any, Any]] = []

    def counterpart(self, operation: Any) -> Any:
        """What stands for an old layer, model or operation; one and the same for all its calls."""
        if operation in self.edit:
            return operation  # a marker: it is called through its chain
        if operation not in self.made:
            self.made[operation] = self._build(operation)
        return self.made[operation]

    def _build(self, operation: Any) -> Any:
        if graph_of(operation) is not None:
            model = self._whole(operation)
            if model is None:
                sequential = isinstance(operation, keras.Sequential)
                model = self._sequential(operation) if sequential else self._functional(operation)
            self.models.append((operation, model))
            return model
        piece = copy_of(operation)
        if isinstance(operation, keras.Layer):
            self.pieces.append(piece)
        return piece.layer

    def _whole(self, model: Any) -> Any | None:
        """The same again from its class, if that is somebody's own and makes the same."""
        parts = {*layers_in(model), *(call.operation for call in calls(model))}
        if (
            _has_kerass_constructor(model)
            or not parts.isdisjoint(self.edit)
            or not parts.isdisjoint(_layers_beside(self.root, model))
        ):
            return None
        try:
            piece = copy_of(model)
            if _anatomy(piece.layer) != _anatomy(model):
                return None
        except Exception:  # it is not known what somebody's constructor does
            return None
        _name_like(model, piece.layer)
        self.pieces.append(piece)
        return piece.layer

    def _functional(self, model: Any) -> Any:
        inputs = keras.tree.map_structure(_new_input, model.input)
        outputs = run_through_graph(
            model, inputs, operation_fn=self.counterpart, call_fn=self._call
        )
        build = type(model) if _has_kerass_constructor(model) else keras.Model
        return build(inputs, outputs, name=model.name)

    def _sequential(self, model: Any) -> Any:
        chain = [_new_input(model.inputs[0])]
        for layer in model.layers:
            pieces = self.edit.get(layer)
            chain += [self.counterpart(layer)] if pieces is None else [p.layer for p in pieces]
        if len(chain) == 1:  # nothing is left, and Keras calls no Sequential model without layers
            chain.append(keras.layers.Identity(name=f"{model.name}_identity"))
        build = type(model) if _has_kerass_constructor(model) else keras.Sequential
        return build(chain, name=model.name)

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        if operation not in self.edit:
            return operation(*args, **kwargs)
        value = given = args[0] if args else next(iter(kwargs.values()))
        for piece in self.edit[operation]:
            if piece.source is operation and value is given:
                value = piece.layer(*args, **kwargs)
            else:
                value = piece.layer(value, **piece.arguments)
        return value

    def finish(self) -> None:
        """Carry over the state; outer models first, since their ``trainable`` spreads inward."""
        for old, new in reversed(self.models):
            new.dtype_policy = old.dtype_policy
            new.trainable = old.trainable
        for piece in self.pieces:
            if isinstance(piece.layer, keras.Layer):
                _carry(piece)


def _new_input(tensor: Any) -> Any:
    """A new input of the same specification and name."""
    config = getattr(operation_of(tensor), "get_config", dict)()
    known = {key: config[key] for key in ("sparse", "ragged", "optional") if key in config}
    name = config.get("name", tensor.name)
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name, **known)


def _layers_beside(root: Any, model: Any) -> Iterator[Any]:
    """All layers of ``root`` but those that are only inside ``model``."""
    if root is not model:
        yield root
        for layer in layers_in(root, itself=False, nested=False):
            yield from _layers_beside(layer, model)


def _anatomy(model: Any) -> list[Any]:
    """What two models have in common that compute the same if their variables are equal."""
    found = calls(model)
    number: dict[Any, int] = {call: i for i, call in enumerate(found)}
    wiring = [
        (
            type(call.operation),
            call.written and call.written[1],
            call.constants,
            [number.get(p) for p in call.producers],
        )
        for call in found
    ]
    outputs = [call.is_output for call in found], [tuple(t.shape) for t in model.outputs]
    variables = [w.path for w in model.weights], [tuple(v.shape) for v in model.variables]
    inner = [k for k in layers_in(model, itself=False) if graph_of(k) is None]
    operations = [c.operation for c in found if not isinstance(c.operation, keras.Layer)]
    ours = {"name": None, "trainable": None}  # carried over
    configs = [{**k.get_config(), **ours} for k in (*inner, *operations)]
    return [wiring, outputs, variables, configs]


def _name_like(old: Any, new: Any) -> None:
    """Names that Keras counted on: of the inputs, and of what has no variables."""
    for ours, theirs in zip(calls(new), calls(old), strict=True):
        ours.operation.name = theirs.operation.name
    for ours, theirs in zip(layers_in(new), layers_in(old), strict=True):
        ours.name = theirs.name
    for ours, theirs in zip(new.inputs, old.inputs, strict=True):
        ours.name = theirs.name


def _has_kerass_constructor(model: Any) -> bool:
    base = keras.Sequential if isinstance(model, keras.Sequential) else functional_class()
    return inspect.signature(type(model).__init__) == inspect.signature(base.__init__)


def _require_class(model: Any) -> None:
    """Refuse to lose a training step that the user wrote."""
    steps = ("train_step", "test_step", "predict_step", "compute_loss", "compile")
    own = [s for s in steps if getattr(type(model), s) is not getattr(keras.Model, s)]
    if own and not _has_kerass_constructor(model):
        raise ModelError(
            f"The class of this model has its own {own[0]}, which a rebuilt model would lose",
            where=model.name,
            expected="a constructor like that of keras.Model(inputs, outputs), or no own steps",
            received=type(model).__name__,
            remedy="work on keras.Model(model.inputs, model.outputs), and put the result back",
        )


# --- state -------------------------------------------------------------------------------------


def _carry(piece: Piece) -> None:
    """Give the new layer its values, and the source's ``trainable``, for all layers inside too."""
    new, old = piece.layer, piece.source
    if old is None:
        return
    same = piece.values is None  # else an activation inside may have been split out
    pairs = list(zip(layers_in(old), layers_in(new), strict=same))
    for inner, its_copy in pairs:
        its_copy.trainable = inner.trainable
    values = old.variables if piece.values is None else piece.values
    shapes, wanted = [tuple(v.shape) for v in new.variables], [tuple(v.shape) for v in values]
    if shapes != wanted:
        raise ModelError(
            "This layer cannot be rebuilt from its config: the copy has other variables",
            where=old.name,
            expected=f"variables of shapes {wanted}",
            received=f"{shapes}",
            remedy="remove quantisation or LoRA from the layer first, or complete its get_config()",
        )
    for variable, value in zip(new.variables, values, strict=True):
        variable.assign(numbers(value))
    for inner, its_copy in pairs:
        _carry_derived(inner, its_copy)


def _carry_derived(old: Any, new: Any) -> None:
    """What preprocessing layers keep beside their variables: tables, and values made from them."""
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    if hasattr(new, "finalize_state"):
        new.finalize_state()
