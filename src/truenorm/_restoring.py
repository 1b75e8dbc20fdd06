"""Everything of some objects as it was: their attributes, their variables, their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from truenorm._rebuilding import numbers


def remember(objects: Iterable[Any], variables: Iterable[Any] = ()) -> Callable[[], None]:
    """Note the attributes of the objects and the values of the variables; gives the way back.

    Attributes are put back as the very objects that they were, and lists, dicts and sets among
    them (Keras's own tracking lists too) with the very elements that they had.
    """
    namespaces = [(vars(one), dict(vars(one))) for one in objects]
    containers = [
        (value, _elements(value))
        for _, attributes in namespaces
        for value in attributes.values()
        if isinstance(value, list | dict | set)
    ]
    values = [(variable, numbers(variable)) for variable in variables]
    # Only torch keeps a gradient on the variable itself.
    gradients = [(v.value, v.value.grad) for v, _ in values if hasattr(v.value, "grad")]

    def restore() -> None:
        for container, elements in containers:
            _refill(container, elements)
        for namespace, attributes in namespaces:
            _refill(namespace, attributes)
        for variable, value in values:
            variable.assign(value)
        for tensor, gradient in gradients:
            tensor.grad = gradient

    return restore


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
