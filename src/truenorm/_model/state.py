"""The state of layers and variables, and how others get it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from truenorm._errors import ModelError
from truenorm._keras_internals import autocasts, layers_in
from truenorm._model.values import numbers

_SETTABLE = ("trainable", "regularizer", "constraint", "overwrite_with_gradient")
"""What can be set on a single variable, also after its layer was made."""

Pairs = Iterable[tuple[Any, Any]]
"""The old one and the new one."""


def learns(variable: Any) -> bool:
    """Whether training changes this variable; False for None, where a layer has none."""
    return variable is not None and variable.trainable


def variable_like(old: Any) -> Any:
    """A new variable with the value, the name, the path and the state of another one."""
    *scopes, name = old.path.split("/")
    with scope(scopes):
        return keras.Variable(
            numbers(old),
            dtype=old.dtype,
            trainable=old.trainable,
            autocast=autocasts(old),
            aggregation=old.aggregation,
            synchronization=old.synchronization,
            name=name,
        )


def scope(names: Sequence[str]) -> Any:
    """The name scope that these names make, wherever it is opened."""
    return keras.name_scope(names[-1] if names else "", override_parent="/".join(names[:-1]))


def carry_values(old: Any, new: Any, values: Sequence[Any]) -> None:
    """Give a layer its values, one for each of its variables."""
    shapes, wanted = [tuple(v.shape) for v in new.variables], [tuple(v.shape) for v in values]
    if shapes != wanted:
        raise ModelError(
            "This layer cannot be made again from its config: the new one has other variables",
            where=old.name,
            expected=f"variables of shapes {wanted}",
            received=f"{shapes}",
            remedy="complete the get_config() of its class",
        )
    for variable, value in zip(new.variables, values, strict=True):
        variable.assign(numbers(value))


def carry_flags(root: Any, layers: Pairs, variables: Pairs) -> None:
    """What learns, down to single variables, and what else can be set on these.

    Args:
        root: The old model.
        layers: All its layers, itself among them, and those of the new model.
        variables: The same of its variables.
    """
    order = {layer: place for place, layer in enumerate(_outer_first(root))}
    for old, new in sorted(layers, key=lambda pair: order.get(pair[0], -1)):
        new.trainable = old.trainable  # reaches all that is inside of it
    for old, new in variables:
        for name in _SETTABLE:
            setattr(new, name, getattr(old, name))


def _outer_first(root: Any) -> list[Any]:
    """A layer and all inside, each behind every other that it is inside of."""
    found: dict[Any, None] = {}

    def visit(layer: Any) -> None:
        if layer not in found:
            for child in layers_in(layer, itself=False, nested=False):
                visit(child)
            found[layer] = None

    visit(root)
    return [*reversed(found)]
