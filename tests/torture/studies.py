"""Studies under fire: workers, drivers and both are killed at random moments until all is done.

``python tests/torture/studies.py [KILLS]`` runs a tiny study of four trials, two at once, again and
again. At a random moment a worker, its driver or both are killed with SIGKILL; then the study is
started again, until it ends. Each time it is seen that no finished trial was lost or changed and
that no worker outlives its driver, now and then that a second driver is refused, and at the end
that the result is the undisturbed one, number by number.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/study")]

import under_fire  # noqa: E402

SEEDS, WORKERS, REFUSED = 2, 2, "Another process is running a study in this folder"
TARGETS = ("worker", "driver", "both")


def driver(folder: Path) -> subprocess.Popen[str]:
    """The study as a process of its own."""
    return subprocess.Popen(
        [sys.executable, under_fire.__file__, str(folder), str(SEEDS), str(WORKERS)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(folder: Path) -> dict[Path, bytes]:
    """The results that are there, byte by byte."""
    return {path: path.read_bytes() for path in folder.glob("trials/*seed[0-9].json")}


def shoot(target: str, folder: Path, running: subprocess.Popen[str]) -> bool:
    """Kill it; whether there was something to kill."""
    workers = under_fire.workers_of(folder)
    if running.poll() is not None or (target == "worker" and not workers):
        return False
    if target != "driver":
        for worker in workers[:1]:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    if target != "worker":
        running.kill()
    return True


def one(folder: Path, longest: float, count: Counter[str]) -> None:
    """Start the study, kill something, look; a finished study is begun anew."""
    before = finished(folder)
    running = driver(folder)
    time.sleep(random.uniform(0, longest))  # noqa: S311
    target = random.choice(TARGETS)  # noqa: S311
    count[f"{target} killed"] += shoot(target, folder, running)
    if target == "worker" and random.random() < 0.2 and running.poll() is None:  # noqa: S311
        refused = REFUSED in driver(folder).communicate()[1]
        # Else the first had come to its end.
        count["second driver refused"] += refused
    _, error = running.communicate()
    if target == "worker" and running.returncode and "StudyError" not in error:
        count["driver failed"] += 1
        print(error, flush=True)
    if not under_fire.all_gone(folder):
        count["orphans"] += 1
    after = finished(folder)
    count["results lost or changed"] += sum(after.get(p) != text for p, text in before.items())


def main(kills: int = 200) -> int:
    """Until so many were killed; 1 if something was lost, changed or left."""
    count: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        wanted = under_fire.facts(
            under_fire.run(Path(temporary, "u"), seeds=SEEDS, workers=WORKERS)
        )
        longest = 1.2 * (time.perf_counter() - start)
        study = 0
        while sum(count[f"{target} killed"] for target in TARGETS) < kills:
            folder = Path(temporary, f"s{study}")
            one(folder, longest, count)
            if len(finished(folder)) == 2 * SEEDS:
                check(folder, wanted, count)
                study += 1
                print(dict(count), flush=True)
        check(folder, wanted, count)
    for what, number in sorted(count.items()):
        print(f"{number:5} {what}", flush=True)
    wrong = ("driver failed", "orphans", "results lost or changed", "results that differ", "left")
    return 1 if any(count[what] for what in wrong) else 0


def check(folder: Path, wanted: list[Any], count: Counter[str]) -> None:
    """Finish the study, and compare."""
    result = under_fire.run(folder, seeds=SEEDS, workers=WORKERS)
    count["studies finished"] += 1
    count["results that differ"] += under_fire.facts(result) != wanted
    count["left"] += len(list(folder.rglob("*.tmp*")))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
