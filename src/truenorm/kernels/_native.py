"""The compiled passes over the data (``native/``), where they could be built.

An array is seen as (outer, channels, inner), contiguous; see ``native/batchnorm.h``. What is
computed, and how its sums are kept right, stands in ``native/passes.h``. The shared library needs
no framework: those that use it pass addresses.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, cast

DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
PATH = Path(__file__).parent / "native" / "libtruenorm.so"


class Call(ctypes.Structure):
    """What ``tn_forward`` and ``tn_backward`` take; addresses that are None are not used."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outer", "channels", "inner")),
        *((name, ctypes.c_int32) for name in ("dtype", "relu", "threads")),
        ("epsilon", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("parallel", "x", "dy", "gamma", "beta", "mean", "variance", "low", "rstd"),
                *("d_gamma", "d_beta", "y"),
            )
        ),
    )


@cache
def library() -> Any | None:
    """The shared library, or None where it was not built for this machine."""
    try:
        found = ctypes.CDLL(str(PATH))
    except OSError:
        return None
    for function in (found.tn_forward, found.tn_backward, found.tn_infer):
        function.argtypes = (ctypes.POINTER(Call),)
    return found


def run(name: str, call: Call) -> None:
    """Call one of the library's functions."""
    if getattr(library(), name)(call) != 0:
        raise MemoryError("no memory for the sums of BatchNormalization")


def own_threads() -> int | None:
    """The address of the library's own threads, for frameworks that do not lend theirs."""
    return ctypes.cast(cast(Any, library()).tn_own_threads, ctypes.c_void_p).value
