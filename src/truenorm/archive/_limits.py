"""What a file of other people may take: parameters, batches, memory and time.

Apart from what loads it, since the commands show it and need nothing else of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

MOST_PARAMETERS = 200_000_000
"""What a model may have unless more is allowed: more than any model with BatchNormalization that
Keras brings along."""
MOST_BATCH = 65_536
"""Largest batch that a model may be fixed to: stateful layers hold a state for each sample."""
GIB = 2**30
MEMORY, FOR_EACH_PROCESSOR, FOR_EACH_BYTE = 3 * GIB, 64 * 2**20, 16
"""What an isolated process may take: a framework with its compiler, its threads, and a multiple of
what the files hold that it opens (weights as they are made, as they are read, their gradients…)."""
SECONDS = 300.0
"""How long loading may take. Running the model is not timed."""


def memory_for(files: Iterable[str | os.PathLike[str] | None]) -> int:
    """How many bytes of private memory a process that opens these files may take."""
    held = sum(Path(file).stat().st_size for file in files if file and Path(file).is_file())
    wanted = MEMORY + FOR_EACH_PROCESSOR * (os.cpu_count() or 1) + FOR_EACH_BYTE * held
    if not hasattr(os, "sysconf"):
        return wanted
    return min(wanted, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
