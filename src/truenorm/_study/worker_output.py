"""The output of a worker process: epochs on stdout, complaints on stderr, both of limited size."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import IO, Any

MARK = "truenorm-epoch "
"""Begins a line of a worker's stdout that tells of an epoch; the rest of the line is JSON."""

_LONGEST = 1 << 16  # characters of a line that are read at once; no epoch has more
_HALF = 1 << 17  # characters of the stderr's beginning that are kept, and of its end
_CHUNK = 1 << 13


def say(epoch: int, metrics: dict[str, float]) -> None:
    """In a worker: tell the driver of an epoch, counted from 1."""
    # On a line of its own, whatever was printed before.
    print("\n" + MARK + json.dumps({"epoch": epoch, "metrics": metrics}), flush=True)


def epochs(stdout: IO[str]) -> Iterator[dict[str, Any]]:
    """The epochs that a worker tells of until its stdout ends; whatever else it prints is lost."""
    while line := stdout.readline(_LONGEST):
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # printed by somebody else
                yield json.loads(line[len(MARK) :])


def complaints(stderr: IO[str]) -> str:
    """All that a worker writes to its stderr until it ends; of much the beginning and the end."""
    beginning, end, lost = "", "", 0
    while text := stderr.read(_CHUNK):
        room = _HALF - len(beginning)
        beginning += text[:room]
        end += text[room:]
        lost += max(0, len(end) - _HALF)
        end = end[-_HALF:]
    return beginning + (f"\n[{lost} characters are left out]\n" if lost else "") + end
