"""The separate process as a copy of this one, which has imported already what it needs."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
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
            code = 1
            try:
                code = _ended(lambda: _do(job, environment, writing))
            finally:  # whatever it is, it must not go on as this process would
                os._exit(code)
        os.close(writing)
        self.stderr: IO[bytes] = os.fdopen(reading, "rb")
        self.returncode: int | None = None

    def wait(self) -> int:
        """Its exit code; below 0 the signal that ended it."""
        if self.returncode is None:
            try:
                _, status = os.waitpid(self._process, 0)
                self.returncode = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # SIGCHLD is ignored here; subprocess answers so, too
                self.returncode = 0
        return self.returncode

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGKILL)


def _do(job: Mapping[str, Any], environment: Mapping[str, str], writing: int) -> None:
    """In the copy: it handles no signal, and nothing is open but the standard output."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(writing, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if number > 2:
            with suppress(OSError):  # one was that of the list
                os.close(number)
    os.environ.update(environment)
    tempfile.tempdir = job["folder"]
    _confinement.run(job)


def _ended(run: Callable[[], None]) -> int:
    """Run it and give its exit code, as Python does at its end."""
    code: Any = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    return code if isinstance(code, int) else int(code is not None)
