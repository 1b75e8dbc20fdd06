"""Kills at random moments: is the old file or the new one there, whole, and nothing else for long?

``python tests/torture/kills.py [KILLS]`` forks a writer for each kill, and prints one row for each
kind of file; all are written through ``truenorm._records.files.replacing``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import keras  # noqa: E402
import small_models as models  # noqa: E402

import truenorm as tn  # noqa: E402
from truenorm import archive, report  # noqa: E402
from truenorm._records.files import replacing  # noqa: E402
from truenorm._records.study import Trial  # noqa: E402


def whole_archive(path: Path) -> bool:
    """Whether every member is there with its checksum, and is read as a model."""
    with zipfile.ZipFile(path) as file:
        return file.testzip() is None and len(archive.read(path).model) > 0


def killed(write: Callable[[], None], longest: float) -> bool:
    """Run the writer in a child and kill it; whether it was still at it."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                write()
        finally:
            os._exit(1)
    time.sleep(random.uniform(0, longest))  # noqa: S311
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def row(
    name: str, path: Path, write: Callable[[], None], whole: Callable[[Path], bool], kills: int
) -> bool:
    """Kill one kind of writer many times, and print what came of it."""
    write()
    start = time.perf_counter()
    write()
    longest = 1.5 * (time.perf_counter() - start) + 0.002
    broken = lost = hit = 0
    most_left = 0
    for _ in range(kills):
        hit += killed(write, longest)
        if not path.exists():
            lost += 1
        elif not whole(path):
            broken += 1
        most_left = max(most_left, len(list(path.parent.iterdir())) - 1)
    write()
    left = len(list(path.parent.iterdir())) - 1
    print(f"{name:28} {hit:6} {broken:7} {lost:5} {most_left:10} {left:11}", flush=True)
    return not (broken or lost or left)


def main(kills: int = 1000) -> int:
    """All kinds; 1 if a file was broken, lost or left behind."""
    keras.utils.set_random_seed(0)
    print(
        f"{'file':28} {'kills':>6} {'broken':>7} {'lost':>5} {'most left':>10} {'at the end':>11}"
    )
    model = models.shake(models.residual())
    folded = tn.fold(model)
    population = tn.collect(model, models.inputs_for(model, 8), batch_size=4)
    trial = Trial("none", 0, {"loss": (1.0,)}, {"loss": 1.0}, 4, 100, 1.0, "none-seed0.keras")
    page = report.report("Kills", "None harms.", [report.Section("Fold", content=(folded,))])

    def result(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(trial.to_json(), "utf-8")

    kinds: list[tuple[str, str, Callable[[Path], None], Callable[[Path], bool]]] = [
        ("fold over its input", "m.keras", lambda p: archive.save(folded.model, p), whole_archive),
        ("recalibrate over its input", "m.keras", lambda p: archive.save(model, p), whole_archive),
        ("Population.save", "p.npz", population.save, lambda p: bool(tn.Population.load(p).sites)),
        ("report", "r.html", lambda p: report.save(p, page),
         lambda p: p.read_text("utf-8") == page),
        ("result of a trial", "t.json", result, lambda p: json.loads(p.read_text())["seed"] == 0),
    ]  # fmt: skip
    good: list[bool] = []
    for name, file, write, whole in kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, file)
            good.append(row(name, path, partial(write, path), whole, kills))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
