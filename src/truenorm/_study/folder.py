"""A study's folder: what lies where, written so that a kill at any moment leaves no half file.

::

    study.json                      the settings that decide the result
    about.json                      its title, what was noted beforehand, the command, the date
    .lock                           held by the process that runs the study
    plan.pkl                        the functions that make model, data, variants and callbacks
    data.npz                        the data, where it is given as arrays
    trials/none-seed0.spec.json     what a worker is asked to do: pure data
    trials/none-seed0.keras         the trained model
    trials/none-seed0.json          the result; it is written last, so it vouches for the rest
    trials/none-seed0.failed.json   why it failed, until it is run again
    trials/none-seed0.json.broken   a result that was not whole, set aside
    trials/none-seed0.stderr        what the worker complained about
    jax_cache/                      compiled programs, shared by the workers
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from truenorm._errors import StudyError
from truenorm._records.files import remove_temporaries, replacing
from truenorm._records.study import Trial
from truenorm._study.datasets import Parts

Arrays = tuple[np.ndarray, np.ndarray]
NAMES = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test")
DATA, ABOUT = "data.npz", "about.json"


@dataclass(frozen=True)
class Spec:
    """What one worker shall do. Paths are relative to the study's folder.

    Args:
        identity: Hash of all that decides the result of this trial.
        position: Name of the variant.
        seed: Decides the initial weights and the order of the batches.
        epochs: How often the training data is gone through.
        batch_size: Samples per step.
        recalibrate: Whether the model is judged with recalibrated statistics.
        keep_model: Whether the trained model is saved.
        costs: Whether the time of ``predict`` is measured, as it is and folded.
        floatx: Keras's default float type in the process that started the study.
        dtype_policy: Keras's default dtype policy there.
    """

    identity: str
    position: str
    seed: int
    epochs: int
    batch_size: int
    recalibrate: bool
    keep_model: bool
    costs: bool
    floatx: str
    dtype_policy: str

    def file(self, ending: str) -> str:
        """File of this trial with that ending."""
        name = self.position
        # A variant may have any name; a file may not, and on Windows and macOS "a" and "A" are one.
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            name = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}-{digest(name)[:8]}"
        return f"trials/{name}-seed{self.seed}{ending}"

    @classmethod
    def read(cls, path: Path) -> Spec:
        """The spec in a file written by :meth:`write`."""
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, folder: Path) -> Path:
        """Write the spec to its place in the folder."""
        path = folder / self.file(".spec.json")
        write_json(path, asdict(self))
        return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this study's own, or see that it is."""
    (folder / "trials").mkdir(exist_ok=True)
    for place in (folder, folder / "trials"):
        remove_temporaries(place)
    path = folder / "study.json"
    if not path.exists():
        (folder / DATA).unlink(missing_ok=True)
        write_json(path, settings)
        return
    try:
        found = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise StudyError(
            "The settings of the study in this folder cannot be read",
            where=str(path),
            received=str(error),
            remedy="delete the folder, or give another one",
        ) from None
    wanted = json.loads(json.dumps(settings))
    names = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
    if names:
        raise StudyError(
            "This folder holds another study: "
            + ("the data differs" if names == ["data"] else f"{', '.join(names)} differ"),
            where=str(folder),
            expected=_listed(found, names),
            received=_listed(wanted, names),
            remedy="give another folder, or the same arguments as before",
        )


def read_about(folder: Path) -> dict[str, Any]:
    """What ``about.json`` says; what it lacks is empty."""
    about: dict[str, Any] = {"name": folder.name, "notes": [], "command": "", "date": ""}
    if (folder / ABOUT).exists():
        about |= json.loads((folder / ABOUT).read_text("utf-8"))
    return about


def _listed(settings: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {str(settings.get(name))[:60]}" for name in names)


def write_data(folder: Path, parts: Parts) -> None:
    """Write the arrays to ``data.npz``."""
    pairs = [pair for pair in (parts.train, parts.validation, parts.test) if pair is not None]
    arrays = [array for pair in pairs for array in pair]
    with replacing(folder / DATA) as temporary:
        np.savez(temporary, **dict(zip(NAMES, arrays, strict=False)))


def read_data(folder: Path) -> Parts | None:
    """The arrays of ``data.npz``, if there are any; pickled objects are refused."""
    if not (folder / DATA).exists():
        return None
    with np.load(folder / DATA, allow_pickle=False) as file:
        arrays = [file[name] for name in NAMES if name in file]
    pairs: Any = zip(arrays[::2], arrays[1::2], strict=True)
    return Parts(*pairs)


def digest(content: Any) -> str:
    """SHA-256 of arrays (type, shape, bytes) or of anything that JSON can say."""
    made = hashlib.sha256()
    if isinstance(content, list) and all(hasattr(item, "dtype") for item in cast(Any, content)):
        for array in cast(list[np.ndarray], content):
            made.update(f"{array.dtype.str}{array.shape}".encode())
            made.update(np.ascontiguousarray(array).data)
    else:
        made.update(json.dumps(content, sort_keys=True, default=str).encode())
    return made.hexdigest()


# --- results -----------------------------------------------------------------------------------


def write_result(folder: Path, spec: Spec, trial: Trial) -> None:
    """Write a finished trial; a number that is not finite is written as null."""
    write_json(folder / spec.file(".json"), {**trial.to_dict(), "identity": spec.identity})
    (folder / spec.file(".failed.json")).unlink(missing_ok=True)


def write_failure(folder: Path, spec: Spec, trial: Trial) -> None:
    """Write why a trial failed; it is run again when the study is."""
    write_json(folder / spec.file(".failed.json"), {**trial.to_dict(), "identity": spec.identity})


def read_result(folder: Path, spec: Spec) -> Trial | None:
    """The finished trial of this spec; None if there is none.

    A file that is not whole, or is of another trial, is set aside with a warning.
    """
    path = folder / spec.file(".json")
    if not path.exists():
        return None
    trial = _trial(path, spec.identity)
    if trial is not None and _is_whole(folder, spec, trial):
        return trial
    aside = path.with_suffix(".json.broken")
    path.replace(aside)
    warnings.warn(
        f"The result {path.name} is not whole or not of this study; it was renamed to {aside.name} "
        "and the trial is run again.",
        stacklevel=2,
    )
    return None


def read_failure(folder: Path, spec: Spec) -> Trial | None:
    """The failed trial of this spec; None if there is none."""
    return _trial(folder / spec.file(".failed.json"), spec.identity)


def _trial(path: Path, identity: str) -> Trial | None:
    """The trial in a file, if it can be read and is the one with this identity."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.pop("identity") != identity:
            return None
        return trial_of(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def trial_of(content: dict[str, Any]) -> Trial:
    """A trial from what ``to_dict`` made of it."""
    history = cast(dict[str, list[float | None]], content["history"])
    named = {
        key: {str(name): _number(value) for name, value in content.get(key, {}).items()}
        for key in ("final", "test")
    }
    known = {name: tuple(map(_number, values)) for name, values in history.items()}
    left: Any = tuple(content.get("left", ()))
    fields: dict[str, Any] = {**content, **named, "history": known, "left": left}
    return Trial(**fields)


def _is_whole(folder: Path, spec: Spec, trial: Trial) -> bool:
    lengths = {len(values) for values in trial.history.values()}
    return (
        (trial.position, trial.seed) == (spec.position, spec.seed)
        and trial.error is None
        and bool(trial.history)
        and bool(trial.final)
        and len(lengths) == 1
        and (lengths == {spec.epochs} or trial.stopped)
        and (not spec.keep_model or (folder / spec.file(".keras")).is_file())
    )


def _number(value: float | None) -> float:
    """A number of a result file, where null stands for one that is not finite."""
    return math.nan if value is None else float(value)
