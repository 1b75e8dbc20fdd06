"""Trials in local processes, some at once: started, watched, and ended in every case."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from truenorm._errors import OutputError
from truenorm._records.study import Trial
from truenorm._study.folder import Spec, read_result
from truenorm._study.progress import OnEvent, Progress, told

_GRACE = 5.0  # seconds that a worker has to end by itself before it is killed
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "NPROC",  # XLA's thread pools on the CPU
)


_Event = tuple[str, Spec, int, Any]


def run_all(
    folder: Path,
    todo: Sequence[Spec],
    *,
    backend: str,
    workers: int | None,
    timeout: float | None,
    on_event: OnEvent | None,
    finished: Sequence[Trial],
) -> list[Trial]:
    """Run every spec in a process; a Trial of each comes back, failed ones with their error.

    Whatever ends it, an exception of ``on_event`` or Ctrl-C too, no process is left behind.

    Args:
        folder: The study's folder.
        todo: What to run.
        backend: Keras's backend in the workers.
        workers: How many at once; None: one per core.
        timeout: Seconds that each may take.
        on_event: Called in the calling thread.
        finished: Trials that are there already; they count in the progress.
    """
    if not todo:
        return []
    cores = os.cpu_count() or 1
    at_once = min(workers or cores, len(todo))
    environment = _environment(
        folder, backend, threads=max(1, cores // at_once), shared=at_once > 1
    )
    total = len(finished) + len(todo)
    trials: list[Trial] = []
    pool = _Pool(folder, environment, timeout)
    executor = ThreadPoolExecutor(at_once)
    try:
        for spec in todo:
            executor.submit(pool.run, spec)
        while len(trials) < len(todo):
            kind, spec, pid, content = pool.events.get()
            if isinstance(content, OSError):
                raise OutputError(
                    "A trial could not be started or its files not be written",
                    where=str(folder),
                    received=str(content),
                    remedy="see that the disk has room, then run the study again: it goes on",
                ) from content
            if isinstance(content, BaseException):
                raise content
            if kind == "ended":
                trials.append(content)
                kind = "failed" if content.error else "finished"
            if on_event is not None:
                on_event(
                    Progress(
                        kind,
                        spec.position,
                        spec.seed,
                        pid,
                        len(finished) + len(trials),
                        total,
                        epoch=content["epoch"] if kind == "epoch" else 0,
                        epochs=spec.epochs,
                        metrics=content["metrics"] if kind == "epoch" else {},
                        error=content.error if kind == "failed" else None,
                    )
                )
    finally:
        pool.stop()
        executor.shutdown(cancel_futures=True)
    return trials


def _environment(folder: Path, backend: str, *, threads: int, shared: bool) -> dict[str, str]:
    """The workers' environment; what the user has set stays."""
    wanted = {"TF_CPP_MIN_LOG_LEVEL": "2"}
    if backend == "jax":  # the trials of a position compile once
        wanted |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    if shared:
        wanted |= dict.fromkeys(_THREADS, str(threads))
        wanted |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    return {**wanted, **os.environ, "KERAS_BACKEND": backend}


class _Pool:
    """The worker processes that are alive, and the one way to start and to end them."""

    def __init__(self, folder: Path, environment: dict[str, str], timeout: float | None) -> None:
        self.events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._folder, self._environment, self._timeout = folder, environment, timeout
        self._lock = threading.Lock()
        self._alive: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, spec: Spec) -> None:
        """Run one trial to its end; called in a thread."""
        pid, started = 0, time.monotonic()
        try:
            path = spec.write(self._folder)
            stderr = self._folder / spec.file(".stderr")
            with stderr.open("w", encoding="utf-8") as file:
                process = self._start(path, file)
                if process is None:
                    return
                pid = process.pid
                self.events.put(("started", spec, pid, None))
                late = self._watch(process, spec)
            trial = None if process.returncode else read_result(self._folder, spec)
            if trial is None:
                reason = _reason(process.returncode, self._timeout if late else None, stderr)
                seconds = time.monotonic() - started
                trial = Trial(spec.position, spec.seed, {}, {}, 0, 0, seconds, "", reason)
            self.events.put(("ended", spec, pid, trial))
        except BaseException as error:  # raised again in the waiting thread
            self.events.put(("crashed", spec, pid, error))

    def _start(self, path: Path, stderr: Any) -> subprocess.Popen[str] | None:
        # -P: nothing in the current folder is taken for a module. A session of its own: the
        # terminal's Ctrl-C reaches the parent alone, which ends its workers itself.
        command = [sys.executable, "-P", "-m", "truenorm._study.trial", str(path)]
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(  # noqa: S603 - our own module
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            self._alive.add(process)
            return process

    def _watch(self, process: subprocess.Popen[str], spec: Spec) -> bool:
        """Pass on what the worker says until it ends; whether it took too long."""
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._timeout, end) if self._timeout is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            for line in process.stdout or ():
                if (content := told(line)) is not None:
                    self.events.put(("epoch", spec, process.pid, content))
            process.wait()
        finally:
            if timer is not None:
                timer.cancel()
            if process.stdout is not None:
                process.stdout.close()
            with self._lock:
                self._alive.discard(process)
        return late.is_set()

    def stop(self) -> None:
        """End every worker: ask, wait a little, kill."""
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


def _reason(code: int, timeout: float | None, stderr: Path) -> str:
    """Why a worker gave no result, with the last lines of what it complained."""
    if timeout is not None:
        problem = f"the trial took longer than {timeout:g} s and was ended"
    elif code < 0:
        problem = f"the worker was ended by signal {-code}"
        problem += " (out of memory?)" if code == -9 else ""
    elif code > 0:
        problem = f"the worker ended with exit code {code}"
    else:
        problem = "the worker left no whole result"
    lines = stderr.read_text("utf-8", errors="replace").strip().splitlines()[-8:]
    return "\n".join([problem, *lines])
