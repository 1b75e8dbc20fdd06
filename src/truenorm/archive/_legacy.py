"""Models of Keras 2, and of Keras 3 in the old format: ``.h5`` files read without running anything.

The format has its configuration in an attribute, and the variables of each layer of the outermost
model under ``model_weights/<layer>``, with their names in attributes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from truenorm._errors import ArchiveError
from truenorm._records.moments import Array
from truenorm.archive._container import MOST_JSON, check_links, parse_json, told

ENDINGS = (".h5", ".hdf5")
CONFIG = "model_config"
WEIGHTS = "model_weights"
RENAMED = {
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
}


def is_legacy(path: str | os.PathLike[str]) -> bool:
    """Whether a file is called like one of the old format."""
    return Path(path).suffix.lower() in ENDINGS


@contextmanager
def opened_h5(path: str | os.PathLike[str]) -> Generator[h5py.File]:
    """The file, if all of its data is in it."""
    if not Path(path).is_file():
        raise ArchiveError(
            "There is no such .h5 file",
            where=str(path),
            expected="a file as model.save('name.h5') writes it",
        )
    with told(str(path)), h5py.File(path, "r") as file:
        check_links(file, file, "")
        yield file


def config_of(file: h5py.File) -> dict[str, Any]:
    """The configuration of the model in a file, as it is written there."""
    if CONFIG not in file.attrs:
        raise ArchiveError(
            "There is no model in this file, at most its weights",
            where=str(file.filename),
            expected=f"an attribute {CONFIG}, as model.save('name.h5') writes it",
        )
    text = text_attribute(file, CONFIG)
    if text is None or len(text) > MOST_JSON:
        raise ArchiveError(
            "The configuration in the file is not as Keras writes it",
            where=f"{file.filename}: {CONFIG}",
            expected=f"text of {MOST_JSON} letters at most",
        )
    return _regular(parse_json(file, CONFIG, text.encode()))


def _regular(entry: Any) -> Any:
    """Names and shapes of old: before 2.2.3 a Sequential was the list of its layers."""
    if isinstance(entry, list):
        return [_regular(one) for one in cast(list[Any], entry)]
    if not isinstance(entry, dict):
        return entry
    made = {key: _regular(one) for key, one in cast(dict[str, Any], entry).items()}
    if made.get("class_name") in RENAMED:
        made["class_name"] = RENAMED[made["class_name"]]
    if made.get("class_name") == "Sequential" and isinstance(made.get("config"), list):
        made["config"] = {"name": made.get("name", "sequential"), "layers": made["config"]}
    return made


def text_attribute(owner: Any, name: str) -> str | None:
    """An attribute that is one text; None if it is something else."""
    if name not in owner.attrs or math.prod(owner.attrs.get_id(name).shape) != 1:
        return None
    value = owner.attrs[name]
    value = value.decode("utf-8") if isinstance(value, bytes | np.bytes_) else value
    return value if isinstance(value, str) else None


def variables_of(file: h5py.File, path: str, name: str) -> dict[str, Array] | None:
    """The variables of one layer by their own names (``gamma``); None if that is not clear.

    Those of the layers inside a model are with the outermost model, under names that end in the
    layer's and the variable's.
    """
    outermost, *inner = path.split("/")
    group = file.get(f"{WEIGHTS}/{outermost}")
    if not isinstance(group, h5py.Group):
        return None
    found: dict[str, Array] = {}
    for stored in _weight_names(group):
        *owners, own = stored.removesuffix(":0").split("/")
        if inner and (not owners or owners[-1] != name):
            continue
        value = group.get(stored)
        if own in found or not isinstance(value, h5py.Dataset) or value.dtype.kind != "f":
            return None
        found[own] = np.asarray(value[()], np.float64)
    return found or None


def _weight_names(group: h5py.Group) -> list[str]:
    """In one attribute, or numbered ones where there are too many."""
    names = ["weight_names"] if "weight_names" in group.attrs else []
    while f"weight_names{len(names)}" in group.attrs:
        names.append(f"weight_names{len(names)}")
    stored = [one for name in names for one in np.ravel(cast(Any, group.attrs[name]))]
    return [one.decode() if isinstance(one, bytes) else str(one) for one in stored]


def copied(path: str | os.PathLike[str], config: Mapping[str, Any], folder: Path) -> Path:
    """The file with another configuration."""
    copy = folder / "translated.h5"
    shutil.copyfile(path, copy)
    with h5py.File(copy, "r+") as file:
        file.attrs[CONFIG] = np.bytes_(json.dumps(config))
    return copy
