"""A look into every BatchNormalization call of a model, from outside, for any model and any layer.

While open, the ``call`` of each layer given is replaced on the instance, so that it works at any
nesting, in subclassed models, for stock layers and ours. Only calls of the thread that opened it
are seen (and those of replicas, which TensorFlow runs in threads of their own): another thread may
predict with the same model meanwhile. Inside a compiled function it acts when the function is
traced: open it inside the function that is compiled, or before its first run.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from truenorm._kernels.replicas import in_replica

Handler = Callable[..., Any]
"""``handler(layer, original, inputs, **arguments)`` gives the output of the call."""

Wrapper = Callable[..., Any]
"""``wrapper(original, *args, **kwargs)`` does what the method is to do instead."""


@contextmanager
def intercepted(layers: Iterable[Any], handler: Handler) -> Generator[None]:
    """While open, calls of these layers go to the handler; afterwards all is as it was."""

    def through(layer: Any) -> Wrapper:
        names = [*inspect.signature(layer.call).parameters][1:]

        def wrapper(original: Any, inputs: Any, *positional: Any, **named: Any) -> Any:
            arguments = dict(zip(names, positional, strict=False)) | named
            return handler(layer, original, inputs, **arguments)

        return wrapper

    with wrapped((layer, "call", through(layer)) for layer in layers):
        yield


@contextmanager
def enclosed(
    layers: Iterable[Any], scope: Callable[[], AbstractContextManager[None]]
) -> Generator[None]:
    """While open, each call of one of these layers runs inside ``scope()``."""

    def inside(original: Any, *args: Any, **kwargs: Any) -> Any:
        with scope():
            return original(*args, **kwargs)

    with wrapped((layer, "call", inside) for layer in layers):
        yield


@contextmanager
def noted(layer: Any, names: Iterable[str], note: Callable[[], None]) -> Generator[None]:
    """While open, ``note`` is called whenever one of these methods of the layer is."""

    def noting(original: Any, *args: Any, **kwargs: Any) -> Any:
        note()
        return original(*args, **kwargs)

    with wrapped((layer, name, noting) for name in names if hasattr(layer, name)):
        yield


class _Method:
    """Stands in the place of a method as long as some thread wraps it."""

    def __init__(self, original: Any, before: dict[str, Any]) -> None:
        self.original, self.before = original, before
        self.wrappers: list[tuple[int, Wrapper]] = []
        functools.update_wrapper(self, original)  # so that its signature can be asked for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method, thread = self.original, threading.get_ident()
        for opened_by, wrapper in tuple(self.wrappers):
            if opened_by == thread or in_replica():
                method = functools.partial(wrapper, method)
        return method(*args, **kwargs)


def put_in_place(target: Any, name: str) -> Any | None:
    """What somebody else than these hooks has put in a method's place on an instance."""
    found = vars(target).get(name)
    return found.before.get(name) if isinstance(found, _Method) else found


_lock = threading.Lock()


@contextmanager
def wrapped(methods: Iterable[tuple[Any, str, Wrapper]]) -> Generator[None]:
    """While open, methods of instances do what their wrappers say, in this thread."""
    undo: list[Callable[[], None]] = []
    try:
        for target, name, wrapper in methods:
            undo.append(_wrap(target.__dict__, target, name, (threading.get_ident(), wrapper)))
        yield
    finally:
        for step in reversed(undo):
            step()


def _wrap(
    attributes: dict[str, Any], target: Any, name: str, wrapper: tuple[int, Wrapper]
) -> Callable[[], None]:
    """Wrap one method, past Keras's tracking; gives the way back."""
    with _lock:
        method = attributes.get(name)
        if not isinstance(method, _Method):
            before = {name: attributes[name]} if name in attributes else {}
            method = attributes[name] = _Method(getattr(target, name), before)
        method.wrappers.append(wrapper)

    def unwrap() -> None:
        with _lock:
            method.wrappers.remove(wrapper)
            if not method.wrappers and attributes.get(name) is method:
                del attributes[name]
                attributes.update(method.before)

    return unwrap


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
