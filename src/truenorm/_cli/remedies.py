"""Remedies as commands, for who has a file and not a model."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from truenorm._records.diagnosis import Diagnosis
    from truenorm._records.rewrite import Rewrite

_CALL = re.compile(r"(?:model = )?((?:tn|truenorm)\.\w+\()")
_NEW = ("--out", "new.keras")
_OPTIONS = {
    "recalibrate": ("upstream", "layers"),
    "fold": ("where",),
    "place": ("where",),
    "replace": ("to",),
    "inspect": (),
    "diagnose": (),
}
"""The commands, and which options of theirs are called as in Python."""

_BOTH = re.compile(r"[^\s:;]+ \((--[^)]*)\)")
"""An option as Python and the command line have it: ``isolate=False (--no-isolate)``."""

_WORDS = {
    "give inspect a batch: inspect(model, x)": "add --data, a file of inputs",
    "give inspect data that the model takes: inspect(model, x, y)": "add --data, a file of inputs",
    "give a probe of your own data": "add --data, a file of inputs",
    "and its undo(), if the model does": "keep the old file, if the new one does",
}


def with_commands(found: Diagnosis, file: Path, data: Path | None) -> Diagnosis:
    """The same with commands in the place of calls."""
    remedies = (in_commands(one.remedy, str(file), data) for one in found.findings)
    pairs = zip(found.findings, remedies, strict=True)
    return replace(found, findings=tuple(replace(one, remedy=remedy) for one, remedy in pairs))


def receipt_with_commands(rewrite: Rewrite, out: Path) -> Rewrite:
    """The same with commands on the new file in the place of calls."""
    return replace(rewrite, notes=tuple(in_commands(note, str(out)) for note in rewrite.notes))


def in_commands(text: str, file: str = "FILE", data: Path | None = None) -> str:
    """A text with commands in the place of calls; as it is, if one of them is not a command's."""
    parts: list[str] = []
    end = 0
    for call, start, stop in _calls(text):
        command = _command(call, file, data)
        if command is None:
            return text
        parts += [text[end:start], shlex.join(command)]
        end = stop
    said = _BOTH.sub(r"\1", "".join([*parts, text[end:]]))
    for ours, theirs in _WORDS.items():
        said = said.replace(ours, theirs)
    return said


def _calls(text: str) -> Iterator[tuple[ast.Call, int, int]]:
    """Each call of truenorm in a text, with the place of it and of what is done with its result."""
    end = 0
    for found in _CALL.finditer(text):
        if found.start() < end:
            continue
        for close in (one.end() for one in re.finditer(r"\)", text) if one.end() > found.start(1)):
            try:
                call = cast(Any, ast.parse(text[found.start(1) : close], mode="eval").body)
            except SyntaxError:  # a parenthesis of something inside
                continue
            end = close + len(".model") * text.startswith(".model", close)
            yield call, found.start(), end
            break


def _command(call: ast.Call, file: str, data: Path | None) -> list[str] | None:
    """The words of the command; None if there is none for this call."""
    name = cast(Any, call.func).attr
    if name not in _OPTIONS or not (call.args and isinstance(call.args[0], ast.Name)):
        return None  # no command, or of a part of the model
    words = ["truenorm", name, file]
    if name == "place":
        words.append(ast.literal_eval(call.args[1]) if len(call.args) > 1 else "POSITION")
    if name in ("recalibrate", "diagnose"):
        words += ["--data", "DATA" if data is None else str(data)]
    if name == "diagnose":
        return [*words, "--loss", "LOSS"]
    if name == "inspect":
        return words if len(call.args) == 1 else None
    for option in call.keywords:
        if option.arg not in _OPTIONS[name] or not isinstance(
            option.value, ast.Constant | ast.List
        ):
            return None
        value = ast.literal_eval(option.value)
        values = cast(list[Any], value) if isinstance(value, list) else [value]
        for one in values:
            words += [f"--{option.arg}", str(one)]
    return [*words, *_NEW]
