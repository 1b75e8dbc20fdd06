"""How the separate process begins that opens somebody else's file: rights are given up first.

Started by its path, ``python -P _confinement.py JOB``, or as a copy of a process that has one
thread (``_copy.py``), and importing nothing but the standard library first: on Linux a thread gives
up rights for itself and for those that it starts, and NumPy and the frameworks start theirs when
they are imported.

What holds on Linux, for any user: a limit on private memory (``RLIMIT_DATA``) and on the size of
files written; no core dump; an alarm; no new rights by setuid programs; no file written, made,
renamed or removed outside of one folder and a few devices (Landlock, from 5.13 on); no sockets
(seccomp, on x86-64 and ARM64), no signals to processes outside (Landlock, from 6.12 on). On macOS
there are a separate process, the alarm, and the limits that the system knows; on Windows a separate
process. Reading files is not prevented: what was read can only leave through what the command
prints or writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import io
import json
import os
import platform
import signal
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DEVICES = ("/dev/null", "/dev/zero", "/dev/tty", "/dev/dri", "/dev/kfd")
"""Devices that may be written to, and those of Nvidia."""


def confine(folder: str, memory: int, seconds: float) -> None:
    """Give up what opening a model does not need; what the system does not offer is left out."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process
    _limit(memory)
    if sys.platform == "linux":
        system = ctypes.CDLL(None, use_errno=True)
        system.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        system.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _only_write_in(system, [folder, *DEVICES, *map(str, Path("/dev").glob("nvidia*"))])
        _no_sockets(system)


def _limit(memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, most in (("RLIMIT_DATA", memory), ("RLIMIT_FSIZE", memory), ("RLIMIT_CORE", 0)):
        kind = getattr(resource, name)
        _, allowed = resource.getrlimit(kind)
        if allowed != resource.RLIM_INFINITY:
            most = min(most, allowed)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))


# --- Landlock: https://docs.kernel.org/userspace-api/landlock.html -------------------------------

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _REFER, _TRUNCATE = 1 << 1, 1 << 13, 1 << 14
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # remove and make, of every kind
_TCP = 0b11  # bind, connect
_OUTSIDE = 0b11  # abstract sockets and signals of processes outside


def _only_write_in(system: Any, places: Iterable[str]) -> None:
    version = system.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    changes = _CHANGES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    handled = struct.pack(
        "=3Q", changes, _TCP if version >= 4 else 0, _OUTSIDE if version >= 6 else 0
    )
    rules = system.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        return
    for place in places:
        with contextlib.suppress(OSError):
            found = os.open(place, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_PATH", 0))
            of_a_file = changes & (_WRITE_FILE | _TRUNCATE)
            allowed = struct.pack("=Qi", changes if Path(place).is_dir() else of_a_file, found)
            system.syscall(_ADD_RULE, rules, 1, allowed, 0)
            os.close(found)
    system.syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)


# --- seccomp: https://docs.kernel.org/userspace-api/seccomp_filter.html --------------------------

_ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""What the kernel calls it, and the number of ``socket``."""
_IO_URING_SETUP, _X32 = 425, 0x40000000
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _no_sockets(system: Any) -> None:
    if platform.machine() not in _ARCHITECTURES:
        return
    architecture, socket = _ARCHITECTURES[platform.machine()]
    program = [  # code, jump if true, jump if false, value
        (_LOAD, 0, 0, 4),
        (_IF_EQUAL, 0, 5, architecture),
        (_LOAD, 0, 0, 0),
        (_IF_AT_LEAST, 3, 0, _X32),
        (_IF_EQUAL, 2, 0, socket),
        (_IF_EQUAL, 1, 0, _IO_URING_SETUP),  # it can open sockets too
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    system.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(_Program(len(program), code)), 0, 0)


def run(job: Mapping[str, Any]) -> None:
    """Confine this process and call the function of the job."""
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(encoding="utf-8")  # as the other process reads it
    confine(job["folder"], job["memory"], job["seconds"])
    sys.path[:] = job["path"]
    module, name = job["entry"].split(":")
    getattr(importlib.import_module(module), name)(job["folder"], **job["arguments"])


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
