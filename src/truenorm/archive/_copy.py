"""The separate process as a copy of this one, which has imported already what it needs."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import IO, Any

from truenorm.archive import _confinement


def is_safe() -> bool:
    """Whether this process has one thread: a copy has no other, and what they held stays locked."""
    try:
        return hasattr(os, "fork") and len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208
    except OSError:  # only Linux tells
        return False


class Copy:
    """A copy of this process that does a job: as much of ``subprocess.Popen`` as is asked of it.

    Args:
        job: As :func:`truenorm.archive._confinement.run` takes it.
        environment: Put into the copy's environment.
    """

    def __init__(self, job: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # or the copy would write it, too
        reading, writing = os.pipe()
        self._process = os.fork()
        if not self._process:
            os._exit(_ended(lambda: _do(job, environment, writing)))
        os.close(writing)
        self.stderr: IO[bytes] = os.fdopen(reading, "rb")
        self.returncode: int | None = None

    def wait(self) -> int:
        """Its exit code; below 0 the signal that ended it."""
        if self.returncode is None:
            _, status = os.waitpid(self._process, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.returncode is None:
            os.kill(self._process, signal.SIGKILL)


def _do(job: Mapping[str, Any], environment: Mapping[str, str], writing: int) -> None:
    """In the copy: nothing of this process is open but its standard output."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(writing, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.update(environment)
    tempfile.tempdir = job["folder"]
    _confinement.run(job)


def _ended(run: Callable[[], None]) -> int:
    """Run it and give its exit code, as Python does at its end."""
    code: Any = 0
    try:
        run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except BaseException:  # whatever it is, it must not go on as this process would
        traceback.print_exc()
        code = 1
    if sys.stderr is not None:
        sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
