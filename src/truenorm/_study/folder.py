"""A study's folder: what lies where, written so that a kill at any moment leaves no half file.

::

    study.json                      the settings that decide the result
    data.npz                        training and validation arrays
    base-seed0.keras                the built model of each seed, before any training
    trials/none-seed0.spec.json     what a worker is asked to do: pure data
    trials/none-seed0.keras         the trained model
    trials/none-seed0.json          the result; it is written last, so it vouches for the rest
    trials/none-seed0.stderr        what the worker complained about
    jax_cache/                      compiled programs, shared by the workers
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from truenorm._errors import StudyError
from truenorm._records.files import replacing
from truenorm._records.study import Trial

Arrays = tuple[np.ndarray, np.ndarray]
NAMES = ("x_train", "y_train", "x_val", "y_val")
DATA = "data.npz"


@dataclass(frozen=True)
class Spec:
    """What one worker shall do. Paths are relative to the study's folder.

    Args:
        study: Hash of the study's settings and data.
        position: Where BatchNormalization shall be.
        seed: Decides the base model and the order of the batches.
        epochs: How often the training data is gone through.
        batch_size: Samples per step.
        recalibrate: Whether the model is judged with recalibrated statistics.
        keep_model: Whether the trained model is saved.
        built_on: Keras's backend in the process that started the study.
        floatx: Keras's default float type in the process that started the study.
        dtype_policy: Keras's default dtype policy there.
    """

    study: str
    position: str
    seed: int
    epochs: int
    batch_size: int
    recalibrate: bool
    keep_model: bool
    built_on: str
    floatx: str
    dtype_policy: str

    @property
    def base(self) -> str:
        """File of the model before training."""
        return f"base-seed{self.seed}.keras"

    def file(self, ending: str) -> str:
        """File of this trial with that ending."""
        return f"trials/{self.position}-seed{self.seed}{ending}"

    @classmethod
    def read(cls, path: Path) -> Spec:
        """The spec in a file written by :meth:`write`."""
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, folder: Path) -> Path:
        """Write the spec to its place in the folder."""
        path = folder / self.file(".spec.json")
        write_json(path, asdict(self))
        return path


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writers that were killed."""
    for place in (folder, folder / "trials"):
        for path in place.glob(".*.tmp*"):
            path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this study's own, or see that it is."""
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    path = folder / "study.json"
    if not path.exists():
        for stale in (folder / DATA, *folder.glob("base-seed*.keras")):
            stale.unlink(missing_ok=True)
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


def _listed(settings: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {str(settings.get(name))[:60]}" for name in names)


def write_arrays(folder: Path, train: Arrays, validation: Arrays) -> None:
    """Write the arrays to ``data.npz``."""
    with replacing(folder / DATA) as temporary:
        np.savez(temporary, **dict(zip(NAMES, (*train, *validation), strict=True)))


def read_arrays(folder: Path) -> tuple[Arrays, Arrays]:
    """The arrays of ``data.npz``; pickled objects are refused."""
    with np.load(folder / DATA, allow_pickle=False) as file:
        x_train, y_train, x_val, y_val = (file[name] for name in NAMES)
    return (x_train, y_train), (x_val, y_val)


# --- results -----------------------------------------------------------------------------------


def write_result(folder: Path, spec: Spec, trial: Trial) -> None:
    """Write a finished trial; a number that is not finite is written as null."""
    write_json(folder / spec.file(".json"), {**trial.to_dict(), "study": spec.study})


def read_result(folder: Path, spec: Spec) -> Trial | None:
    """The finished trial of this spec; None if there is none, or not a whole one of this study."""
    try:
        content = json.loads((folder / spec.file(".json")).read_text("utf-8"))
        owner = (content.pop("study"), content["position"], content["seed"])
        content["history"] = {
            str(name): tuple(map(_number, values)) for name, values in content["history"].items()
        }
        content["final"] = {str(name): _number(value) for name, value in content["final"].items()}
        trial = Trial(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    whole = (
        owner == (spec.study, spec.position, spec.seed)
        and trial.error is None
        and bool(trial.history)
        and bool(trial.final)
        and all(len(values) == spec.epochs for values in trial.history.values())
        and (not spec.keep_model or (folder / spec.file(".keras")).is_file())
    )
    return trial if whole else None


def _number(value: float | None) -> float:
    """A number of a result file, where null stands for one that is not finite."""
    return math.nan if value is None else float(value)
