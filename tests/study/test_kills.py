"""Studies whose processes are killed, or say too much: nothing finished is lost, nothing is left.

``tests/torture/studies.py`` does the same at random moments, many times.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import under_fire
from test_study import POSITIONS, build, run

from truenorm._records.files import owned_name
from truenorm._study.folder import open_folder
from truenorm._study.pool import Progress
from truenorm._study.worker_output import MARK, complaints, epochs

pytestmark = [pytest.mark.any_backend, pytest.mark.long]

MB = 1 << 20
HERE = os.getpid()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return under_fire.run(tmp_path_factory.mktemp("undisturbed") / "study")


@pytest.mark.skipif(os.name != "posix", reason="asks ps")
def test_a_killed_driver_takes_its_workers_along_and_loses_no_trial(
    undisturbed: Any, tmp_path: Path
) -> None:
    folder, hang = tmp_path / "study", tmp_path / "hang"
    told: list[str] = []
    with subprocess.Popen(
        [sys.executable, under_fire.__file__, str(folder), "1", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "UNDER_FIRE_HANG": str(hang)},
    ) as driver:
        for line in driver.stdout or ():
            told.append(line)
            if line.startswith("finished"):
                hang.touch()  # the second trial would last for ten minutes
            if line.startswith("started") and hang.exists():
                break
        pid = int(told[-1].split()[1])
        assert lives(pid), "".join(told)
        driver.kill()
    limit = time.monotonic() + 100  # its interpreter has to start, on a machine that may be busy
    while lives(pid) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not lives(pid)
    results = [*folder.glob("trials/*seed[0-9].json")]
    assert len(results) == 1
    before = {path: path.read_bytes() for path in results}
    assert under_fire.facts(under_fire.run(folder)) == under_fire.facts(undisturbed)
    assert {path: path.read_bytes() for path in results} == before
    assert not list(folder.rglob("*.tmp*"))


def test_only_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    living = tmp_path / f"trials/.a-seed0.{owned_name()}.tmp.json"
    dead = living.with_name(living.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-"))
    for path in (living, dead):
        path.write_text("half")
    open_folder(tmp_path, {"seeds": [0]})
    assert living.exists()
    assert not dead.exists()


def noisy() -> Any:
    """In a trial: 100 MB on each stream, half of it in one line, then a failure that says why."""
    if os.getpid() != HERE:
        for stream in (sys.stdout, sys.stderr):
            stream.write("x" * (50 * MB))
            for _ in range(50):
                stream.write(("y" * 1023 + "\n") * 1024)
            stream.flush()
        raise ValueError("enough said")
    return build()


def test_200_mb_of_words_leave_less_than_one_and_take_little_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception, match="enough said"):
        run(tmp_path, build=noisy, seeds=1, workers=1, positions=POSITIONS)
    files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(files) < MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024
    text = (tmp_path / f"trials/{POSITIONS[0]}-seed0.stderr").read_text()
    assert "characters are left out]" in text
    assert text.endswith("ValueError: enough said\n")


def with_a_child() -> Any:
    """In a trial: a process that would outlive it and hold its pipes open."""
    if os.getpid() != HERE:
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    return build()


def child_of(pid: int) -> int:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return int(found.stdout.split()[0]) if found.stdout.split() else 0


def lives(pid: int) -> bool:
    found = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_what_a_trial_started_ends_with_it(tmp_path: Path) -> None:
    children: list[int] = []

    def kill(event: Progress) -> None:
        if event.kind == "started":
            limit = time.monotonic() + 60
            while not (child := child_of(event.pid)) and time.monotonic() < limit:
                time.sleep(0.05)
            children.append(child)
            os.kill(event.pid, signal.SIGKILL)

    with pytest.raises(Exception, match="ended by signal 9"):
        run(tmp_path, build=with_a_child, seeds=1, workers=1, on_event=kill)
    assert len(children) == 2
    assert all(children)
    assert not any(map(lives, children))


def test_epochs_are_told_among_other_lines(tmp_path: Path) -> None:
    epoch = MARK + '{"epoch": 1, "metrics": {}}'
    path = tmp_path / "said"
    path.write_text("\n".join(("loading", epoch, MARK + "of somebody else", "x" * 10**6, "")))
    with path.open(encoding="utf-8") as file:
        assert list(epochs(file)) == [{"epoch": 1, "metrics": {}}]


def test_few_complaints_are_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "said"
    for text in ("", "a\n", "é" * 200_000):
        path.write_text(text, "utf-8")
        with path.open(encoding="utf-8") as file:
            assert complaints(file) == text
