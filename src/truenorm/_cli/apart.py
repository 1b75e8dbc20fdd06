"""Whether this is the separate process that a command runs in, and what differs there."""

from __future__ import annotations

import signal
from pathlib import Path

MADE = "made.keras"

_handover: Path | None = None


def begin(folder: str) -> None:
    """This is the separate process, and files are left here."""
    global _handover
    _handover = Path(folder)


def handed_over() -> Path | None:
    """Where to save instead, if this is the separate process: the other one puts it in place."""
    return None if _handover is None else _handover / MADE


def is_apart() -> bool:
    """Whether this is the separate process."""
    return _handover is not None


def loaded() -> None:
    """Loading, which is timed in the separate process, is over."""
    if _handover is not None and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
