"""The compiled passes over the data (``native/``), where they could be built.

An array is seen as (outer, channels, inner), contiguous; see ``native/batchnorm.h``. What is
computed for each value stands in ``native/passes.h``; what for each channel, and how sums are kept
right, in ``native/statistics.h``. The shared library needs no framework: those that use it pass
addresses.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
WIDE = 8
"""What is added to the number of a dtype of less for sums in double: ``TN_WIDE``."""
PATH = Path(__file__).parent / "native" / "libtruenorm.so"
INTERFACE = 6
"""``TN_INTERFACE`` of ``native/batchnorm.h``; to be raised there and here together."""


FUNCTIONS = ("tn_forward", "tn_backward", "tn_infer", "tn_normalize", "tn_gradient")


class Call(NamedTuple):
    """The fields of ``tn_call`` in ``native/batchnorm.h``, where their meaning stands.

    From ``parallel`` to ``dadd`` they are addresses, 0 where there is nothing.
    """

    outer: int
    channels: int
    inner: int
    dtype: int
    relu: int = 0
    threads: int = 1
    unbiased: int = 0
    epsilon: float = 0.0
    momentum: float = 0.0
    parallel: int = 0
    x: int = 0
    dy: int = 0
    gamma: int = 0
    beta: int = 0
    mean: int = 0
    variance: int = 0
    low: int = 0
    rstd: int = 0
    dgamma: int = 0
    dbeta: int = 0
    y: int = 0
    moving_mean: int = 0
    moving_variance: int = 0
    moved_mean: int = 0
    moved_variance: int = 0
    mask: int = 0
    add: int = 0
    out: int = 0
    dadd: int = 0
    groups: int = 0
    run: int = 0


CALL = struct.Struct("@3q4i2d20P2q")
"""A :class:`Call` as C lays it out."""


@cache
def loaded() -> Any | None:
    """The shared library; None, and one warning, where it is missing, unsafe or of other code.

    No warning where no system has it, or where it is not wanted (``TRUENORM_NATIVE=0``).
    """
    if os.environ.get("TRUENORM_NATIVE") == "0" or not sys.platform.startswith(("linux", "darwin")):
        return None
    found, reason = _opened()
    if reason is not None:
        warnings.warn(
            f"truenorm runs without its compiled passes, and slower: {reason} ({PATH}). Remedy: "
            "install truenorm again, or set TRUENORM_NATIVE=0 to do without them.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


OF_ANOTHER_VERSION = "their library is not that of this version of truenorm"


def _opened() -> tuple[Any | None, str | None]:
    """The library, or why not."""
    reason = flaw()
    if reason is not None:
        return None, reason
    try:
        found = ctypes.CDLL(str(PATH))
        numbers = [ctypes.c_int.in_dll(found, n).value for n in ("tn_interface", "tn_call_size")]
    except OSError:
        return None, "their library is not for this machine"
    except ValueError:  # it lacks the names
        return None, OF_ANOTHER_VERSION
    if numbers != [INTERFACE, CALL.size]:
        return None, OF_ANOTHER_VERSION
    for name in FUNCTIONS:
        getattr(found, name).argtypes = (ctypes.c_char_p,)
    return found, None


def flaw() -> str | None:
    """Why the library's file must not be loaded; None if nothing speaks against it.

    Loading half a file kills the process: an ELF file ends with its table of sections, and its head
    says where. Of any other file the system's loader finds out by itself that it is no library.
    What any user of the machine may write to may hold anybody's code.
    """
    try:
        with PATH.open("rb") as file:
            head, size = file.read(64), PATH.stat().st_size
        modes = [place.stat().st_mode for place in (PATH, PATH.parent)]
    except OSError:
        return "their library is missing"
    if any(mode & stat.S_IWOTH and not mode & stat.S_ISVTX for mode in modes):
        return "any user of this machine may write to their library or its folder"
    if len(head) < 64:
        return "their library is cut off"
    if head.startswith(b"\x7fELF\x02"):
        (table,) = struct.unpack_from("=Q", head, 40)
        entry, entries = struct.unpack_from("=HH", head, 58)
        if table + entry * entries > size:
            return "their library is cut off"
    return None


def run(name: str, call: Call) -> None:
    """Call one of the library's functions."""
    status = getattr(loaded(), name)(CALL.pack(*call))
    if status == -1:
        raise MemoryError("no memory for the sums of BatchNormalization")
    if status != 0:
        raise ValueError(f"the compiled passes of BatchNormalization have no dtype {call.dtype}")


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def own_threads() -> int:
    """The address of the library's own threads, for frameworks that do not lend theirs."""
    return ctypes.cast(cast(Any, loaded()).tn_own_threads, ctypes.c_void_p).value or 0
