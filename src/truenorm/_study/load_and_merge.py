"""Studies in folders: reading one without running anything, and merging two of the same study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truenorm._errors import StudyError
from truenorm._records.study import Study
from truenorm._study.experiment import judged
from truenorm._study.folder import read_about, read_failure, read_result, write_json
from truenorm._study.lock import only_driver
from truenorm._study.settings import specs_of


def load(folder: str | Path) -> Study:
    """The study in a folder, as far as it has come; nothing in the folder is run.

    Raises:
        StudyError: There is no study, or too few of its trials have finished to compare anything.
    """
    folder = Path(folder)
    settings, about = _read(folder)
    trials = [
        trial
        for spec in specs_of(settings, keep_models=False)
        if (trial := read_result(folder, spec) or read_failure(folder, spec)) is not None
    ]
    total = len(settings["seeds"]) * len(settings["positions"])
    missing = total - len(trials)
    if missing:
        note = f"The study is not finished: {missing} of {total} trials are missing."
        about = {**about, "notes": [*about["notes"], note]}
    return judged(trials, settings, about)


def merge(folder: str | Path, *others: str | Path) -> None:
    """Put the trials of other folders of the same study into one; of each trial the first counts.

    The folders must have the same settings but for the seeds, as those of a study whose seeds were
    divided among machines.

    Raises:
        StudyError: A folder holds another study, or none, or is in use.
    """
    target = Path(folder)
    settings, _ = _read(target)
    with only_driver(target):
        for other in map(Path, others):
            theirs, _ = _read(other)
            _check_same(settings, theirs, target, other)
            own = {spec.identity for spec in specs_of(settings, keep_models=False)}
            seeds = sorted({*settings["seeds"], *theirs["seeds"]})
            for spec in specs_of(theirs, keep_models=False):
                known = spec.identity in own and read_result(target, spec) is not None
                if known or read_result(other, spec) is None:
                    continue
                for ending in (".keras", ".json"):  # the result last: it vouches for the model
                    if (other / spec.file(ending)).is_file():
                        shutil.copyfile(other / spec.file(ending), target / spec.file(ending))
            settings = {**settings, "seeds": seeds}
            write_json(target / "study.json", settings)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        settings = json.loads((folder / "study.json").read_text("utf-8"))
        about = read_about(folder)
        specs_of(settings, keep_models=False)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise StudyError(
            "There is no study in this folder, or it cannot be read",
            where=str(folder),
            expected="a folder that truenorm.study or 'truenorm study' wrote",
            received=str(error),
        ) from error
    return settings, about


def _check_same(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path, other: Path
) -> None:
    names = sorted(
        name for name in {*ours, *theirs} - {"seeds"} if ours.get(name) != theirs.get(name)
    )
    if names:
        raise StudyError(
            f"These folders hold different studies: {', '.join(names)} differ",
            where=str(other),
            expected=f"the settings of {folder}",
            remedy="merge folders whose settings are equal but for the seeds",
        )
