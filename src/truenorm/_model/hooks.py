"""A look into every BatchNormalization call of a model, from outside, for any model and any layer.

While open, the ``call`` of each layer given is replaced on the instance, so that it works at any
nesting, in subclassed models, for stock layers and ours. Inside a compiled function it acts when
the function is traced: open it inside the function that is compiled, or before its first run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Handler = Callable[..., Any]
"""``handler(layer, original, inputs, **arguments)`` gives the output of the call."""


@contextmanager
def intercepted(layers: Iterable[Any], handler: Handler) -> Generator[None]:
    """While open, calls of these layers go to the handler; afterwards all is as it was."""
    with patched((layer, "call", _through(layer, layer.call, handler)) for layer in layers):
        yield


def _through(layer: Any, original: Any, handler: Handler) -> Any:
    names = [*inspect.signature(original).parameters][1:]

    def call(inputs: Any, *positional: Any, **named: Any) -> Any:
        arguments = dict(zip(names, positional, strict=False)) | named
        return handler(layer, original, inputs, **arguments)

    return call


@contextmanager
def enclosed(
    layers: Iterable[Any], scope: Callable[[], AbstractContextManager[None]]
) -> Generator[None]:
    """While open, each call of one of these layers runs inside ``scope()``."""

    def inside(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with scope():
                return original(*args, **kwargs)

        return call

    with patched((layer, "call", inside(layer.call)) for layer in layers):
        yield


@contextmanager
def noted(layer: Any, names: Iterable[str], note: Callable[[], None]) -> Generator[None]:
    """While open, ``note`` is called whenever one of these methods of the layer is."""

    def noting(method: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            note()
            return method(*args, **kwargs)

        return wrapper

    existing = [name for name in names if hasattr(layer, name)]
    with patched((layer, name, noting(getattr(layer, name))) for name in existing):
        yield


@contextmanager
def patched(patches: Iterable[tuple[Any, str, Any]]) -> Generator[None]:
    """Set attributes on instances, past Keras's tracking; undo it whatever happens."""
    undo: list[Callable[[], Any]] = []
    try:
        for target, name, value in patches:
            attributes = target.__dict__
            if name in attributes:
                undo.append(lambda a=attributes, n=name, old=attributes[name]: a.update({n: old}))
            else:
                undo.append(lambda a=attributes, n=name: a.pop(n, None))
            attributes[name] = value
        yield
    finally:
        for step in reversed(undo):
            step()
