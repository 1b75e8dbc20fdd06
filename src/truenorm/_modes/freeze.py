"""Freezing exactly what was meant: the statistics, gamma and beta, or both; at once, and undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras

from truenorm._checks import known_options
from truenorm._errors import ModelError
from truenorm._keras_internals import layers_in
from truenorm._layer.arguments import FreezePolicy, check_policy
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._model.sites import Layers, chosen_layers, is_own_class, policy_of
from truenorm._model.trainer import has_optimizer
from truenorm._modes.optimizer import follow, state_of
from truenorm._records.freezing import Freezing, Frozen
from truenorm._records.tables import counted


@known_options
def freeze(model: Any, policy: FreezePolicy = "all", *, layers: Layers = None) -> Freezing:
    """Set what BatchNormalization layers do not learn; changes the model in place, at once.

    ============== =============== ========================= =================
    policy         normalises with moving statistics updated gamma, beta learn
    ============== =============== ========================= =================
    ``none``       batch           yes                       yes
    ``all``        moving          no                        no
    ``statistics`` moving          no                        yes
    ``affine``     batch           yes                       no
    ============== =============== ========================= =================

    (in training mode; in inference mode a layer always normalises with the moving statistics.)

    No new ``compile`` is needed, before or after ``fit``: the compiled functions of the model are
    made anew, and its optimizer, the same object, learns what is trainable now. What it knows of
    the variables that go on learning (momentum and the like) it keeps.

    Args:
        model: Any Keras model, compiled or not. Give the model that you train: a model around it
            that is compiled cannot be seen from inside.
        policy: What not to learn. ``"all"`` is Keras's ``trainable=False``; ``"statistics"`` and
            ``"affine"`` need truenorm's layer.
        layers: Which BatchNormalization layers: None for all; a path pattern such as
            ``"backbone/*"``; a predicate on the layer; or a list of patterns and layers, where a
            layer that contains BatchNormalization stands for all of them inside.

    Returns:
        The layers with their policies before and after, and ``undo()``.

    Raises:
        ModelError: The model has no BatchNormalization; or a layer of Keras's is asked for what it
            cannot do. Nothing is changed then.
        OptionError: There is no such policy, or no such layer.

    Example:
        >>> import keras, truenorm as tn
        >>> layer = tn.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
        >>> frozen = tn.freeze(model, "statistics")
        >>> tn.inspect(model).modes["fit"][0].describe()
        'moving + learns'
        >>> frozen.undo()
        >>> tn.inspect(model).modes["fit"][0].describe()
        'batch + updates + learns'

    Where frameworks differ:
        Keras wants ``compile`` after every change of ``trainable``. Without it ``fit`` obeys as
        long as it has made no step. After one, TensorFlow goes on as compiled; JAX raises an error
        (or goes on, if the layer has neither gamma nor beta); PyTorch obeys a layer that was
        frozen, and raises an error for one that was thawed. PyTorch's own layer has the three parts
        apart: ``eval()``, ``track_running_stats`` and ``requires_grad``.
    """
    chosen = chosen_layers(model, layers)
    _require_able(chosen, policy)
    before = {layer: policy_of(layer) for layer in chosen}
    restore_flags = [_remember_flags(layer) for layer in chosen]
    models = [one for one in layers_in(model) if isinstance(one, keras.Model)]
    learned = {one: state_of(one.optimizer) for one in models if has_optimizer(one)}

    def undo() -> None:
        for restore in restore_flags:
            restore()
        follow(models, chosen, learned)

    try:
        for layer in chosen:
            if isinstance(layer, BatchNormalization):
                layer.freeze = policy
            else:
                layer.trainable = policy != "all"
        follow(models, chosen, {})
    except BaseException:  # Ctrl-C included: all or nothing
        for restore in restore_flags:
            restore()
        raise
    done = tuple(Frozen(path, before[layer], policy_of(layer)) for layer, path in chosen.items())
    return Freezing(done, tuple(_notes(model, chosen)), undo=undo)


@known_options
def unfreeze(model: Any, *, layers: Layers = None) -> Freezing:
    """Let BatchNormalization layers learn everything again: :func:`freeze` with ``"none"``.

    To get back what was before a ``freeze``, whatever that was, use its ``undo()``.

    Args:
        model: As in :func:`freeze`.
        layers: As in :func:`freeze`.

    Returns:
        As :func:`freeze`. A note says which layers are inside a frozen one: their statistics move
        then, but their gamma and beta are not learned.

    Raises:
        ModelError: The model has no BatchNormalization.
        OptionError: There is no such layer.

    Example:
        >>> import keras, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(trainable=False)
        >>> model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
        >>> _ = tn.unfreeze(model)
        >>> layer.trainable
        True
    """
    return freeze(model, "none", layers=layers)


def _require_able(chosen: dict[Any, str], policy: str) -> None:
    """Refuse before anything is changed."""
    check_policy(policy)
    for layer, path in chosen.items():
        if policy in ("statistics", "affine") and not isinstance(layer, BatchNormalization):
            raise ModelError(
                f"Keras's BatchNormalization cannot be frozen in part (policy '{policy}')",
                where=path,
                expected="truenorm's BatchNormalization, or the policy 'all' or 'none'",
                received=f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}",
                remedy=_OWN if is_own_class(layer) else _STOCK,
            )


_OWN = "derive its class from truenorm.BatchNormalization"
_STOCK = (
    "put truenorm's layer in its place: replace(model, to='truenorm').model, or "
    "truenorm.BatchNormalization where the model is made"
)


def _remember_flags(layer: Any) -> Callable[[], None]:
    trainable = layer.trainable
    held = layer.get_config().get("freeze", "none")  # also where trainable=False hides it
    flags = [(variable, variable.trainable) for variable in layer.variables]

    def restore() -> None:
        if isinstance(layer, BatchNormalization):
            layer.freeze = held
        layer.trainable = trainable
        for variable, flag in flags:
            variable.trainable = flag

    return restore


def _notes(model: Any, chosen: dict[Any, str]) -> Iterator[str]:
    for one in layers_in(model):
        inside = layers_in(one, itself=False)
        awake = [path for layer, path in chosen.items() if layer.trainable and layer in inside]
        if awake and not one.trainable:
            inside_it = counted(len(awake), "layer")
            yield (
                f"'{one.name}' is frozen: gamma and beta of the {inside_it} inside are not "
                "learned, whatever their own policy."
            )
