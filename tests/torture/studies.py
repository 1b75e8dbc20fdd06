"""Studies under fire: workers, drivers and both are killed at random moments until all is done.

``python tests/torture/studies.py [KILLS [FRESH]]`` runs a tiny study, two trials at once. At random
moments a worker, its driver or both are killed with SIGKILL; a study whose driver is gone is
started again, until all of its trials are there, and then the next. Each time a driver has ended it
is seen that no finished trial was lost or changed and that no process is left, now and then that a
second driver is refused, and at the end of a study that the result is the undisturbed one.

The first ``FRESH`` kills are of processes as users have them. Most of such a process's life is
imports; so in the others driver and workers are forked from processes that have imported all of it,
by what ``subprocess`` does before it would start another program. All else is the study's own.
"""

from __future__ import annotations

import io
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/study")]
os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch's operations hang after a fork of several threads

import keras  # noqa: E402
import under_fire  # noqa: E402

from truenorm import StudyError  # noqa: E402
from truenorm._keras_internals import leave_tensorflow_unloaded  # noqa: E402
from truenorm._study import local, trial  # noqa: E402, F401 - for the forked

SEEDS, WORKERS, REFUSED = 3, 2, "Another process is running a study in this folder"
TRIALS = SEEDS * len(under_fire.POSITIONS)
TARGETS = ("worker", "driver", "both")
PATIENCE = 300.0
ENDED, FAILED_TRIALS, SECOND = 0, 3, 4
real_popen = subprocess.Popen


# --- processes ----------------------------------------------------------------------------------


def run(folder: Path) -> Any:
    """The study, without its words."""
    with redirect_stdout(io.StringIO()):
        return under_fire.run(folder, seeds=SEEDS, workers=WORKERS)


def study(folder: Path) -> None:
    """The study in this process, which then ends."""
    code = 1
    try:
        run(folder)
        code = ENDED
    except StudyError as error:
        code = SECOND if REFUSED in str(error) else FAILED_TRIALS
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def fresh_driver(folder: Path) -> int:
    """The study in a new process, with new workers."""
    command = [sys.executable, __file__, "driver", str(folder)]
    return real_popen(command, cwd=folder).pid


def forked_driver(folder: Path) -> int:
    """The study in a fork of this process, which forks its workers."""
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        local.subprocess.Popen = forked_worker  # type: ignore[misc,assignment]
        study(folder)
    return pid


def forked_worker(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
    """What a study starts a worker with, but it is a fork instead of a program."""

    def become() -> None:
        code = 1
        try:
            os.closerange(3, 1024)  # the pipes of others, and the one that waits for the program
            os.environ.update(env)
            sys.argv = command[2:]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    return real_popen(command, preexec_fn=become, **options)


def workers_of(folder: Path, driver: int = 0) -> list[int]:
    """The processes of a study but for its driver: they are in its folder."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return [pid for pid in found if pid != driver]


def all_gone(folder: Path, seconds: float = 60.0) -> bool:
    """Whether nothing of this study runs any more, at once or soon."""
    limit = time.monotonic() + seconds
    while workers_of(folder):
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a child that ends within this time."""
    limit = time.monotonic() + seconds
    while True:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            return None
        time.sleep(0.005)


# --- fire ---------------------------------------------------------------------------------------


def finished(folder: Path) -> dict[Path, bytes]:
    """The results that are there, byte by byte."""
    return {path: path.read_bytes() for path in folder.glob("trials/*seed[0-9].json")}


def shoot(target: str, folder: Path, driver: int) -> bool:
    """Kill it; whether there was something to kill."""
    workers = workers_of(folder, driver)
    if target == "worker" and not workers:
        return False
    if target != "driver" and workers:
        with suppress(ProcessLookupError):
            os.kill(random.choice(workers), signal.SIGKILL)  # noqa: S311
    if target != "worker":
        os.kill(driver, signal.SIGKILL)
    return True


def one(folder: Path, start: Callable[[Path], int], longest: float, most: int) -> Counter[str]:
    """Start the study, and kill until its driver has ended; what was seen."""
    count: Counter[str] = Counter()
    before, driver = finished(folder), start(folder)
    target, code = random.choice(TARGETS), ended(driver, random.uniform(0, longest))  # noqa: S311
    while code is None and killed(count) < most:
        if shoot(target, folder, driver):
            count[f"{target} killed"] += 1
            if random.random() < 0.05 and target == "worker":  # noqa: S311
                # Not counted where the first has come to its end.
                count["second driver refused"] += ended(start(folder), PATIENCE) == SECOND
            target = random.choice(TARGETS)  # noqa: S311
        code = ended(driver, random.uniform(0, longest))  # noqa: S311
    if code is None and (code := ended(driver, PATIENCE)) is None:
        count["hung"] += 1
        os.kill(driver, signal.SIGKILL)
        os.waitpid(driver, 0)
    count["driver failed"] += code not in (ENDED, FAILED_TRIALS, -signal.SIGKILL, None)
    count["orphans"] += not all_gone(folder)
    after = finished(folder)
    count["results lost or changed"] += sum(after.get(p) != text for p, text in before.items())
    return count


def made(folder: Path) -> Path:
    """The folder, which is there now."""
    folder.mkdir()
    return folder


def killed(count: Counter[str]) -> int:
    """How many kills there were."""
    return sum(count[f"{target} killed"] for target in TARGETS)


def check(folder: Path, wanted: list[Any], count: Counter[str]) -> None:
    """Finish the study, and compare."""
    while len(finished(folder)) < TRIALS and not count["driver failed"]:
        count.update(one(folder, forked_driver, 1.0, most=0))
    result = run(folder)  # reads what is there
    count["studies finished"] += 1
    count["results that differ"] += under_fire.facts(result) != wanted
    count["files left"] += len(list(folder.rglob("*.tmp*")))


def main(kills: int = 200, fresh: int = 10) -> int:
    """Until so many were killed; 1 if something was lost, changed or left."""
    leave_tensorflow_unloaded()
    count: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        start = time.perf_counter()
        wanted = under_fire.facts(run(root / "u"))
        of_a_fresh_one = WORKERS * (time.perf_counter() - start) / TRIALS
        start = time.perf_counter()
        assert not killed(one(made(root / "f"), forked_driver, 0.0, most=0))
        of_a_fork = WORKERS * (time.perf_counter() - start) / TRIALS
        print(
            f"{keras.config.backend()}: a trial takes {of_a_fresh_one:.1f} s in a new process, "
            f"{of_a_fork:.1f} in a fork",
            flush=True,
        )
        folder = made(root / "s0")
        while killed(count) < kills:
            new = killed(count) < fresh
            driver, each = (fresh_driver, of_a_fresh_one) if new else (forked_driver, of_a_fork)
            most = (fresh if new else kills) - killed(count)
            count.update(one(folder, driver, each, most))
            if len(finished(folder)) == TRIALS:
                check(folder, wanted, count)
                print(dict(count), flush=True)
                folder = made(root / f"s{count['studies finished']}")
        check(folder, wanted, count)
    for what, seen in sorted(count.items()):
        print(f"{seen:5} {what}", flush=True)
    wrong = (
        "driver failed", "hung", "orphans", "results lost or changed", "results that differ",
        "files left",
    )  # fmt: skip
    return 1 if any(count[what] for what in wrong) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["driver"]:
        study(Path(sys.argv[2]))
    sys.exit(main(*map(int, sys.argv[1:])))
