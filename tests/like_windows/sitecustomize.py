"""On PYTHONPATH: this Python without what it lacks on Windows, from its start, in every process.

The frameworks and NumPy still find the Linux that they were built for, so names that they need
there stay. ``msvcrt`` locks bytes of a file for one open file, from its position on, as on Windows.
"""

import fcntl
import os
import signal
import struct
import subprocess  # noqa: F401 (it takes whoever has msvcrt for Windows)
import sys
import types

GONE = {
    os: "chown fchown fchmod lchown fork forkpty getgid getpgid getpgrp getsid getuid geteuid "
    "killpg mkfifo sched_getaffinity setsid setpgid statvfs sysconf O_DIRECTORY O_NOFOLLOW O_PATH",
    signal: "SIGALRM SIGHUP SIGPIPE setitimer alarm pthread_sigmask",
}
set_lock, own, kind, start = fcntl.fcntl, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, os.SEEK_SET


def locking(descriptor: int, _mode: int, count: int) -> None:
    """Lock some bytes, or raise; what is locked there can't be read, so text must not be."""
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    if position < 100:
        raise RuntimeError("others cannot read the text of this file any more")
    set_lock(descriptor, own, struct.pack("hhqqi4x", kind, start, position, count, 0))


for module, names in GONE.items():
    for name in names.split():
        delattr(module, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty"):
    sys.modules[name] = None  # type: ignore[assignment]
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)  # type: ignore[assignment]
