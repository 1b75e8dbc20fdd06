"""Trials in processes of this machine."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

from truenorm._study.folder import Spec, read_result
from truenorm._study.pool import Event, failed
from truenorm._study.worker_output import complaints, epochs

_GRACE = 5.0  # seconds that a worker has to end by itself before it is killed
_WORKER = Path(__file__).with_name("worker.py")
_WIDTH = 1000  # characters of a line that is quoted in a failed trial
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "NPROC",  # XLA's thread pools on the CPU
)


def _environment(folder: Path, backend: str, *, threads: int, shared: bool) -> dict[str, str]:
    """The workers' environment; what the user has set stays."""
    wanted = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONIOENCODING": "utf-8"}  # as it is read here
    if backend == "jax":  # the trials of a position compile once
        wanted |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    if shared:
        wanted |= dict.fromkeys(_THREADS, str(threads))
        wanted |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    # The user's modules are found where this process finds them.
    path = os.pathsep.join(filter(None, sys.path))
    return {**wanted, **os.environ, "PYTHONPATH": path, "KERAS_BACKEND": backend}


class Local:
    """Runs trials in processes of this machine.

    Args:
        folder: The study's folder.
        backend: Keras's backend in the workers.
        workers: How many at once; None: one per core.
        timeout: Seconds that each may take.
    """

    def __init__(
        self, folder: Path, *, backend: str, workers: int | None, timeout: float | None
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._folder, self._backend, self._timeout = folder, backend, timeout
        self._workers = workers
        self._environment: dict[str, str] = {}
        self._lock = threading.Lock()
        self._alive: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._executor: ThreadPoolExecutor | None = None

    def start(self, todo: Sequence[Spec]) -> None:
        """Start the trials, one thread for each that runs."""
        cores = os.cpu_count() or 1
        at_once = min(self._workers or cores, len(todo))
        self._environment = _environment(
            self._folder, self._backend, threads=max(1, cores // at_once), shared=at_once > 1
        )
        self._executor = ThreadPoolExecutor(at_once)
        for spec in todo:
            self._executor.submit(self.run, spec)

    def run(self, spec: Spec) -> None:
        """Run one trial to its end; called in a thread."""
        pid, started = 0, time.monotonic()
        try:
            path = spec.write(self._folder)
            stderr = self._folder / spec.file(".stderr")
            process = self._start(path)
            if process is None:
                return
            pid = process.pid
            self.events.put(("started", spec, pid, None))
            late = self._watch(process, spec, stderr)
            trial = None if process.returncode else read_result(self._folder, spec)
            if trial is None:
                trial = failed(
                    spec,
                    _reason(process.returncode, self._timeout if late else None),
                    seconds=time.monotonic() - started,
                    lines=_last_lines(stderr),
                    failure="timeout" if late else "killed" if process.returncode < 0 else "error",
                )
            self.events.put(("ended", spec, pid, trial))
        except BaseException as error:  # raised again in the waiting thread
            self.events.put(("crashed", spec, pid, error))

    def _start(self, path: Path) -> subprocess.Popen[str] | None:
        # -P: nothing in the current folder is taken for a module. A session of its own: the
        # terminal's Ctrl-C reaches the parent alone, which ends its workers itself. The pipe to its
        # stdin tells the worker that this process is gone, however it went.
        command = [sys.executable, "-P", str(_WORKER), str(path)]
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(  # noqa: S603 - our own module
                command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            self._alive.add(process)
            return process

    def _watch(self, process: subprocess.Popen[str], spec: Spec, stderr: Path) -> bool:
        """Pass on what the worker says until it ends; whether it took too long."""

        def listen() -> None:
            for content in epochs(cast(IO[str], process.stdout)):
                self.events.put(("epoch", spec, process.pid, content))

        with process, ThreadPoolExecutor(2) as ears:
            said = ears.submit(complaints, cast(IO[str], process.stderr))
            ears.submit(listen)
            try:
                process.wait(self._timeout)
                late = False
            except subprocess.TimeoutExpired:
                late = True
            finally:
                process.kill()
                _end_children(process)  # they hold the pipes open, too
        with self._lock:
            self._alive.discard(process)
        stderr.write_text(said.result(), "utf-8")
        return late

    def stop(self) -> None:
        """End every worker: ask, wait a little, kill."""
        try:
            self._end()
        finally:
            if self._executor is not None:
                self._executor.shutdown(cancel_futures=True)

    def _end(self) -> None:
        with self._lock:
            self._stopped = True
            alive = list(self._alive)
        try:
            for process in alive:
                process.terminate()
            limit = time.monotonic() + _GRACE
            for process in alive:
                try:
                    process.wait(max(0.0, limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    break
        finally:
            for process in alive:
                process.kill()  # does nothing to one that has ended


def _end_children(worker: subprocess.Popen[str]) -> None:
    """End what a worker started: loaders of its data, for example."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)  # the worker leads a group of its own


def _reason(code: int, timeout: float | None) -> str:
    """Why a worker gave no result."""
    if timeout is not None:
        return f"the trial took longer than {timeout:g} s and was ended"
    if code < 0:
        hint = " (out of memory?)" if code == -9 else ""
        return f"the worker was ended by signal {-code}{hint}"
    return f"the worker ended with exit code {code}" if code else "the worker left no whole result"


def _last_lines(stderr: Path) -> list[str]:
    lines = stderr.read_text("utf-8").strip().splitlines()[-8:]
    return [line[:_WIDTH] for line in lines]
