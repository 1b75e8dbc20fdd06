"""What in a configuration holds code, or asks for code that is not Keras's: found by name alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

CODE = frozenset(
    {"Lambda", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer", "__lambda__",
     "__typespec__"}
)  # fmt: skip
"""Classes of Keras that hold code, or run a program that was saved elsewhere."""

PACKAGES = ("keras", "truenorm", "builtins")
"""Whose classes and functions are no code of others; Keras calls its own functions builtins."""


def package_of(module: Any) -> str | None:
    """The package of a class by the module that its entry names."""
    return module.split(".")[0] if isinstance(module, str) else None


def code_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each entry that holds code or asks for some, at any depth: where it is, and what it is.

    Args:
        value: A part of the configuration.
        path: Names of the layers that it is in, joined by ``/``.
    """
    if isinstance(value, dict):
        entry = cast(dict[str, Any], value)
        config = entry.get("config")
        name = cast(dict[str, Any], config).get("name") if isinstance(config, dict) else None
        if "class_name" in entry and isinstance(name, str):
            path = f"{path}/{name}" if path else name
        what = _code(entry)
        if what is not None:
            yield path, what
        for inner in entry.values():
            yield from code_in(inner, path)
    elif isinstance(value, list):
        for inner in cast(list[Any], value):
            yield from code_in(inner, path)


def _code(entry: dict[str, Any]) -> str | None:
    kind, package = str(entry.get("class_name")), package_of(entry.get("module"))
    if kind in CODE:
        return {"__lambda__": "a Python lambda"}.get(kind, kind)
    if "class_name" in entry and package is not None and package not in PACKAGES:
        return f"{entry.get('registered_name') or kind}, which is code of {package}"
    return None
