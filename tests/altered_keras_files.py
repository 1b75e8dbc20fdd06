"""``.keras`` files made anew with a change, as somebody could who means harm."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

CONFIG, WEIGHTS = "config.json", "model.weights.h5"


def remade(file: Path, change: Callable[[dict[str, bytes]], None], target: Path) -> Path:
    """The file with other members, and right checksums."""
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    return target


def with_config(file: Path, change: Callable[[Any], None], target: Path) -> Path:
    def edit(members: dict[str, bytes]) -> None:
        config = json.loads(members[CONFIG])
        change(config)
        members[CONFIG] = json.dumps(config).encode()

    return remade(file, edit, target)


def with_weights(file: Path, change: Callable[[h5py.File], None], target: Path) -> Path:
    def edit(members: dict[str, bytes]) -> None:
        content = io.BytesIO(members[WEIGHTS])
        with h5py.File(content, "r+") as variables:
            change(variables)
        members[WEIGHTS] = content.getvalue()

    return remade(file, edit, target)


def layer_named(config: Any, name: str) -> Any:
    return next(one for one in config["config"]["layers"] if one["config"]["name"] == name)
