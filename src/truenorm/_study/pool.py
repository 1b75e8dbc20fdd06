"""Run the trials of a study, several at once: start them, watch them, and end them in any case.

A runner is what knows how to start and end trials: :mod:`truenorm._study.local` in processes of
this machine, :mod:`truenorm._study.ray_tasks` in tasks of a Ray cluster. It reports into one queue,
which is read here.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from truenorm._errors import OutputError
from truenorm._records.study import Trial
from truenorm._study.folder import Spec, write_failure

NO_ROOM = ("No space left on device", "Disk quota exceeded")
_MEMORY = ("MemoryError", "OutOfMemory", "out of memory", "RESOURCE_EXHAUSTED", "bad_alloc")


@dataclass(frozen=True)
class Progress:
    """Something that happened in a study.

    Args:
        kind: ``started``, ``epoch``, ``finished`` or ``failed``.
        position: The trial's position, or the name of its variant.
        seed: The trial's seed.
        pid: The process that runs it.
        done: Trials of the study that have ended by now, this one included.
        total: Trials of the study.
        epoch: At an ``epoch``: its number, from 1.
        epochs: Epochs of the trial.
        metrics: At an ``epoch``: Keras's logs; at ``finished``: the final metrics.
        error: At ``failed``: why.
    """

    kind: str
    position: str
    seed: int
    pid: int
    done: int
    total: int
    epoch: int = 0
    epochs: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    error: str | None = None


OnEvent = Callable[[Progress], None]
Event = tuple[str, Spec, int, Any]
"""Kind, trial, process, and what came: for ``epoch`` its number and metrics, for ``ended`` the
trial, for ``crashed`` an exception of the runner itself."""


class Runner(Protocol):
    """Starts trials, reports what happens to them, and ends those that are left."""

    events: queue.SimpleQueue[Event]

    def start(self, todo: Sequence[Spec]) -> None:
        """Start all trials, as many at once as there is room for; returns at once."""
        ...

    def stop(self) -> None:
        """End every trial that has not ended. Nothing of it is left when this returns."""
        ...


def run_all(
    folder: Path,
    todo: Sequence[Spec],
    runner: Runner,
    *,
    on_event: OnEvent | None,
    finished: Sequence[Trial],
) -> list[Trial]:
    """Run every spec; a Trial of each comes back, failed ones with their error.

    Whatever ends it, an exception of ``on_event`` or Ctrl-C too, nothing is left running.

    Args:
        folder: The study's folder.
        todo: What to run.
        runner: Who runs it.
        on_event: Called in the calling thread.
        finished: Trials that are there already; they count in the progress.
    """
    if not todo:
        return []
    trials: list[Trial] = []
    try:
        runner.start(todo)
        while len(trials) < len(todo):
            kind, spec, pid, content = runner.events.get()
            if kind == "crashed":
                raise _crash(folder, content)
            if kind == "ended":
                trials.append(content)
                kind = _ended(folder, spec, content)
            if on_event is not None:
                done, total = len(finished) + len(trials), len(finished) + len(todo)
                told = Progress(kind, spec.position, spec.seed, pid, done, total)
                on_event(_filled(told, spec, content))
    finally:
        runner.stop()
    return trials


def _ended(folder: Path, spec: Spec, trial: Trial) -> str:
    if trial.error is None:
        return "finished"
    if any(words in trial.error for words in NO_ROOM):
        raise _no_room(folder, trial.error.splitlines()[-1])
    write_failure(folder, spec, trial)
    return "failed"


def _filled(told: Progress, spec: Spec, content: Any) -> Progress:
    """The event with what belongs to its kind."""
    more: dict[str, Any] = {"epochs": spec.epochs}
    if told.kind == "epoch":
        more |= {"epoch": content["epoch"], "metrics": content["metrics"]}
    if told.kind == "finished":
        more |= {"metrics": content.final}
    if told.kind == "failed":
        more |= {"error": content.error}
    return Progress(**{**vars(told), **more})


def _crash(folder: Path, error: BaseException) -> BaseException:
    return _no_room(folder, str(error)) if isinstance(error, OSError) else error


def _no_room(folder: Path, what: str) -> OutputError:
    return OutputError(
        "A trial could not be started or its files not be written",
        where=str(folder),
        received=what,
        remedy="see that the disk has room, then run the study again: it goes on",
    )


def failed(
    spec: Spec, reason: str, *, seconds: float, lines: Sequence[str] = (), failure: str = "error"
) -> Trial:
    """A trial that gave no result: why, in one line, with the last lines of what it said."""
    if failure == "error" and any(word in line for word in _MEMORY for line in lines):
        reason, failure = f"{reason}: there was not enough memory", "memory"
    text = "\n".join([reason, *lines])
    return Trial(spec.position, spec.seed, {}, {}, 0, 0, seconds, "", error=text, failure=failure)
