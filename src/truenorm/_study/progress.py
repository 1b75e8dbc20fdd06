"""What a study tells while it runs: events for the caller, and lines of a worker's epochs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MARK = "truenorm-epoch "  # begins such a line of a worker's stdout; the rest of it is JSON


@dataclass(frozen=True)
class Progress:
    """Something that happened in a study.

    Args:
        kind: ``started``, ``epoch``, ``finished`` or ``failed``.
        position: The trial's position.
        seed: The trial's seed.
        pid: The process that runs it.
        done: Trials of the study that have ended by now, this one included.
        total: Trials of the study.
        epoch: At an ``epoch``: its number, from 1.
        epochs: Epochs of the trial.
        metrics: At an ``epoch``: Keras's logs.
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


def tell(epoch: int, metrics: Mapping[str, float]) -> None:
    """In a worker: report an epoch, counted from 1, to the process that reads the stdout."""
    print(_MARK + json.dumps({"epoch": epoch, "metrics": metrics}), flush=True)


def told(line: str) -> dict[str, Any] | None:
    """The epoch that a line of a worker's stdout reports; None if it is another line."""
    return json.loads(line[len(_MARK) :]) if line.startswith(_MARK) else None
