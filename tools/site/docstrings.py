"""Docstrings as the site shows them: what is written for Sphinx, in Markdown.

Formulas become ``$…$`` and ``$$…$$``, references to public names links, examples a section of
examples.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

_BLOCK = re.compile(r"^( *)\.\. math:: (.*(?:\n\1 +\S.*)*)$", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_NAME = re.compile(r":(?:func|class|attr|meth|mod):`([^`]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_CALL = re.compile(r"^Call arguments:\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
_TABLE = re.compile(r"^(=+(?: =+)+)\n(.+)\n\1\n((?:.+\n)+?)\1$", re.MULTILINE)


def markdown(text: str) -> str:
    """The text of a docstring as Markdown."""
    text = _TABLE.sub(_as_table, inspect.cleandoc(text))
    text = _CALL.sub(_as_list, text)
    text = _BLOCK.sub(lambda found: f"{found[1]}$$ {' '.join(found[2].split())} $$", text)
    text = _INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    text = _NAME.sub(lambda found: _link(found[1]), text)
    text = re.sub(" ::$", "", text, flags=re.MULTILINE)  # an indented block of code follows
    return _EXAMPLE.sub("Examples:", re.sub("::$", ":", text, flags=re.MULTILINE))


def _link(name: str) -> str:
    """A link where the name has a place on the site, else the name."""
    public = name.startswith("truenorm.") and "._" not in name
    return f"[`{name}`][{name}]" if public else f"`{name}`"


def _as_list(found: re.Match[str]) -> str:
    """The arguments of a call, which griffe does not know, as a list."""
    return "Call arguments:\n" + re.sub(
        r"^ {4}(\w+): ", r"    * **\1**: ", found[1], flags=re.MULTILINE
    )


def _as_table(found: re.Match[str]) -> str:
    """A simple table of reStructuredText, whose columns are as wide as its rules."""
    edges = [rule.span() for rule in re.finditer("=+", found[1])]

    def row(line: str) -> str:
        ends = [*(start for start, _ in edges[1:]), None]
        return " | ".join(line[a:b].strip() for (a, _), b in zip(edges, ends, strict=True))

    rule = " | ".join("---" for _ in edges)
    return "\n".join([row(found[2]), rule, *map(row, found[3].splitlines())])


class Markdown(griffe.Extension):
    """Has griffe read every docstring as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
