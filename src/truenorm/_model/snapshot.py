"""Everything of some objects as it was: their attributes, their variables, their gradients."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import keras
import numpy as np

from truenorm._kernels.run_time import is_value
from truenorm._model.values import kept


def remember(objects: Iterable[Any], variables: Iterable[Any] = ()) -> Callable[[], None]:
    """Note the attributes of the objects and the values of the variables; gives the way back.

    Attributes are put back as the very objects that they were, and lists, dicts and sets among
    them (Keras's own tracking lists too) with the very elements that they had; optimizers among
    them with all of their own.
    """
    owners, found = _with_all_inside(objects)
    containers = [(container, _elements(container)) for container in found]
    namespaces = [(vars(one), dict(vars(one))) for one in owners]
    optimizers = [one for one in owners if isinstance(one, keras.optimizers.Optimizer)]
    variables = [*variables, *(v for one in optimizers for v in one.variables)]
    # Buffers of torch's own modules; Keras's variables are not among them.
    buffers = [(b, b.clone()) for one in owners for b in getattr(one, "buffers", list)()]
    values = [kept(variable) for variable in variables]
    # Only torch keeps a gradient on the variable itself.
    gradients = [(v.value, v.value.grad) for v in variables if hasattr(v.value, "grad")]

    def restore() -> None:
        for container, elements in containers:
            _refill(container, elements)
        for namespace, attributes in namespaces:
            _refill(namespace, attributes)
        for put_back in values:
            put_back()
        for tensor, gradient in gradients:
            tensor.grad = gradient
        for buffer, value in buffers:
            buffer.copy_(value)

    return restore


@contextmanager
def lasting(variables: Iterable[Any]) -> Generator[None]:
    """Variables that have lost their value by the end get back the one of the start.

    It happens on JAX: one that is assigned to inside a loop, a conditional or the like holds what
    is a value only there; and a ``fit`` that fails in its first step leaves nothing in any.
    """
    held = [(variable, variable.value) for variable in variables]
    try:
        yield
    finally:
        for variable, value in held:
            if not _has_value(variable) and is_value(value):  # else fit has given it away
                variable.assign(value)


def _has_value(variable: Any) -> bool:
    try:
        return is_value(variable.value)
    except TypeError:  # Keras has emptied it, and then does not find its initializer either
        return False


def _with_all_inside(objects: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """The objects, torch's modules and optimizers in them; and all their containers."""
    owners, containers = [*objects], list[Any]()
    owners += [m for one in owners for m in getattr(one, "modules", list)() if m not in owners]
    for one in owners:  # grows meanwhile
        for found in _inside(vars(one).values()):
            if not isinstance(found, keras.optimizers.Optimizer):
                containers.append(found)
            elif found not in owners:
                owners.append(found)
    return owners, containers


def _inside(values: Iterable[Any], depth: int = 4) -> Iterator[Any]:
    """The containers among these values, those inside of them, and optimizers."""
    for value in values:
        if isinstance(value, keras.optimizers.Optimizer):
            yield value
        elif isinstance(value, list | dict | set) and depth:
            yield value
            elements = value.values() if isinstance(value, dict) else value
            yield from _inside(cast(Iterable[Any], elements), depth - 1)


def _elements(container: Any) -> Any:
    kind = next(base for base in (list, dict, set) if isinstance(container, base))
    return kind(container)


def _refill(container: Any, elements: Any) -> None:
    """Past the container's own methods: Keras's would track or refuse the change."""
    if _identities(container) == _identities(elements):
        return  # as nearly always
    inner = getattr(container, "__wrapped__", container)  # TensorFlow puts dicts into a proxy
    if isinstance(inner, list):
        list[Any].clear(inner)
        list[Any].extend(inner, elements)
    elif isinstance(inner, dict):
        dict[Any, Any].clear(inner)
        dict[Any, Any].update(inner, elements)
    else:
        set[Any].clear(inner)
        set[Any].update(inner, elements)


def _identities(container: Any) -> Any:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in cast(dict[Any, Any], container).items()]
    return [*map(id, container)]


@contextmanager
def same_randomness() -> Generator[None]:
    """Give the global random generators back as they were: new layers draw seeds from them."""
    python, numpy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")  # only if it is there already, on its own backend
    state = torch.get_rng_state() if torch is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.set_rng_state(state)
