"""The compiled passes over the data (``native/``), where they could be built.

An array is seen as (outer, channels, inner), contiguous; see ``native/batchnorm.h``. What is
computed, and how its sums are kept right, stands in ``native/passes.h``. The shared library needs
no framework: those that use it pass addresses.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from pathlib import Path
from typing import Any, cast

DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
PATH = Path(__file__).parent / "native" / "libtruenorm.so"


CALL = struct.Struct("@3q4i2d17P")
"""The call in C: outer, channels, inner; dtype, relu, threads, unbiased; epsilon, momentum; and
addresses, 0 for none: parallel, x, dy, gamma, beta, mean, variance, low, rstd, d_gamma, d_beta, y,
moving mean and variance, these moved, mask.
"""


@cache
def loaded() -> Any | None:
    """The shared library, or None where it was not built for this machine, or from other code."""
    try:
        found = ctypes.CDLL(str(PATH))
        if ctypes.c_int.in_dll(found, "tn_call_size").value != CALL.size:
            return None
    except (OSError, ValueError):
        return None
    for function in (found.tn_forward, found.tn_backward, found.tn_infer):
        function.argtypes = (ctypes.c_char_p,)
    return found


def run(name: str, *call: float) -> None:
    """Call one of the library's functions with the numbers of :data:`CALL`."""
    if getattr(loaded(), name)(CALL.pack(*call)) < 0:
        raise MemoryError("no memory for the sums of BatchNormalization")


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def own_threads() -> int:
    """The address of the library's own threads, for frameworks that do not lend theirs."""
    return ctypes.cast(cast(Any, loaded()).tn_own_threads, ctypes.c_void_p).value or 0
