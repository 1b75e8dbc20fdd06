"""Trials as tasks of a Ray cluster: one task each, in a process of its own, where there is room.

Ray schedules, starts again what was lost with its node, and keeps the data in each node's memory
once. Results come back to the driver, which writes them to the study's folder as they come.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from truenorm._errors import MissingDependencyError, StudyError
from truenorm._keras_internals import leave_tensorflow_unloaded
from truenorm._records.files import replacing
from truenorm._records.study import Trial
from truenorm._study.folder import Spec, read_data, write_result
from truenorm._study.plan import PLAN
from truenorm._study.pool import Event, failed

RETRIES = 3
"""How often Ray starts a task again that was lost with its process or node."""

_POLL = 0.2  # seconds between looks at what has ended
_ANSWER = 5.0  # seconds that an address has to answer


class RayTasks:
    """Runs trials as Ray tasks.

    Args:
        folder: The study's folder, on the machine of the driver.
        address: Of a cluster, such as ``10.0.0.1:6379`` or ``ray://host:10001``; ``"ray"`` for the
            one that this process is connected to, or else a new one on this machine.
        backend: Keras's backend in the tasks.
        workers: How many trials run at once; None: as many as there is room for.
        timeout: Seconds that each may take, from its start.
        resources: Options of the tasks, such as ``{"num_cpus": 4, "num_gpus": 1}``: see
            ``ray.remote``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: str,
        backend: str,
        workers: int | None,
        timeout: float | None,
        resources: Mapping[str, Any] | None,
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._folder, self._backend = folder, backend
        self._workers, self._timeout = workers, timeout
        self._resources = dict(resources or {})
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._running: dict[Any, Spec] = {}
        self._started: dict[tuple[str, int], float] = {}
        self._pids: dict[tuple[str, int], int] = {}
        self._late: set[tuple[str, int]] = set()
        self._ray, self._own = connected(address)
        self._inbox: Any = None

    def start(self, todo: Sequence[Spec]) -> None:
        """Put plan and data into the cluster once, and hand out the tasks."""
        ray = self._ray
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._inbox = ray.remote(num_cpus=0, scheduling_strategy=here)(_Inbox).remote()
        plan = ray.put((self._folder / PLAN).read_bytes())
        data = ray.put(read_data(self._folder))
        wanted = {"max_calls": 1, "max_retries": RETRIES, **self._resources}
        environment: dict[str, Any] = {**cast(Any, wanted.get("runtime_env") or {})}
        variables = {"TF_CPP_MIN_LOG_LEVEL": "2", **environment.get("env_vars", {})}
        environment["env_vars"] = {**variables, "KERAS_BACKEND": self._backend}
        task = ray.remote(**{**wanted, "runtime_env": environment})(_trial)
        waiting = list(todo)

        def more() -> None:
            room = len(waiting) if self._workers is None else self._workers - len(self._running)
            for spec in waiting[:room]:
                self._running[task.remote(plan, data, spec, self._inbox)] = spec
            del waiting[:room]

        more()
        self._thread = threading.Thread(target=self._watch, args=(more,), daemon=True)
        self._thread.start()

    def _watch(self, more: Callable[[], None]) -> None:
        try:
            while self._running and not self._stopped.is_set():
                ended, _ = self._ray.wait(list(self._running), timeout=_POLL)
                self._tell()
                self._end_late()
                for task in ended:
                    spec = self._running.pop(task)
                    trial = self._result(task, spec)
                    self.events.put(("ended", spec, self._pids.get(_key(spec), 0), trial))
                more()
        except BaseException as error:  # raised again in the waiting thread
            if not self._stopped.is_set():
                spec = next(iter(self._running.values()), None)
                self.events.put(("crashed", spec, 0, _lost(error)))  # pyright: ignore[reportArgumentType]

    def _tell(self) -> None:
        """Pass on what the tasks have said since the last look."""
        specs = {_key(spec): spec for spec in self._running.values()}
        for kind, key, pid, content in self._ray.get(self._inbox.taken.remote()):
            if kind == "started":
                self._started[key], self._pids[key] = time.monotonic(), pid
            if key in specs:
                self.events.put((kind, specs[key], pid, content))

    def _end_late(self) -> None:
        if self._timeout is None:
            return
        for task, spec in self._running.items():
            key = _key(spec)
            began = self._started.get(key)
            late = began is not None and time.monotonic() - began > self._timeout
            if late and key not in self._late:
                self._late.add(key)
                self._ray.cancel(task, force=True)

    def _result(self, task: Any, spec: Spec) -> Trial:
        """The trial of a task that has ended, written to the folder."""
        errors = self._ray.exceptions
        seconds = time.monotonic() - self._started.get(_key(spec), time.monotonic())

        def lost(reason: str, failure: str, error: BaseException | None = None) -> Trial:
            lines = [] if error is None else str(error).strip().splitlines()[-8:]
            return failed(spec, reason, seconds=seconds, lines=lines, failure=failure)

        try:
            trial, model = self._ray.get(task)
        except errors.OutOfMemoryError as error:
            return lost("the node had not enough memory for the trial", "memory", error)
        except (
            errors.TaskCancelledError,
            errors.WorkerCrashedError,
            errors.NodeDiedError,
        ) as error:
            if _key(spec) in self._late:
                reason = f"the trial took longer than {self._timeout:g} s and was ended"
                return lost(reason, "timeout")
            return lost(f"the task was lost {RETRIES + 1} times", "killed", error)
        except errors.RayTaskError as error:
            return lost("the task ended with an exception", "error", error)
        if model is not None:
            with replacing(self._folder / spec.file(".keras")) as temporary:
                temporary.write_bytes(model)
        write_result(self._folder, spec, trial)
        return trial

    def stop(self) -> None:
        """Cancel what is left; a cluster that was started for this study ends."""
        self._stopped.set()
        try:
            if self._thread is not None:
                self._thread.join()
            with contextlib.suppress(Exception):  # the cluster may be gone
                for task in self._running:
                    self._ray.cancel(task, force=True)
                if self._running:
                    self._ray.wait(
                        list(self._running), num_returns=len(self._running), timeout=_ANSWER
                    )
                if self._inbox is not None:
                    self._ray.kill(self._inbox)
        finally:
            if self._own:
                self._ray.shutdown()


class _Inbox:
    """Keeps what tasks say until the driver takes it; on the driver's node, so it is not lost."""

    def __init__(self) -> None:
        self._told: list[tuple[str, tuple[str, int], int, Any]] = []

    def tell(self, *event: Any) -> None:
        self._told.append(event)  # pyright: ignore[reportArgumentType]

    def taken(self) -> list[Any]:
        told, self._told = self._told, []
        return told


def _trial(plan: bytes, data: Any, spec: Spec, inbox: Any) -> tuple[Trial, bytes | None]:
    """One task: the trial, and its trained model if that is kept."""
    import pickle

    from truenorm._study import trial

    leave_tensorflow_unloaded()
    key, pid = _key(spec), os.getpid()
    inbox.tell.remote("started", key, pid, None)
    models: list[bytes] = []

    def tell(epoch: int, metrics: dict[str, float]) -> None:
        inbox.tell.remote("epoch", key, pid, {"epoch": epoch, "metrics": metrics})

    def save(model: Any) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            model.save(path)
            models.append(path.read_bytes())
        return spec.file(".keras")

    loaded = pickle.loads(plan)  # noqa: S301 - from our own driver
    done = trial.run(trial.Training(loaded, spec, data), tell, save)
    return done, models[0] if models else None


def connected(address: str) -> tuple[Any, bool]:
    """Ray, connected to a cluster; and whether the cluster is this study's own.

    Raises:
        MissingDependencyError: Ray is not installed.
        StudyError: Nothing answers at the address.
    """
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.util.scheduling_strategies")
    except ImportError as error:
        raise MissingDependencyError(
            "Ray is not installed", remedy='pip install "truenorm[ray]"'
        ) from error
    if ray.is_initialized():
        return ray, False
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address == "ray":
        ray.init(include_dashboard=False, **quiet)
        return ray, True
    _answers(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise _unreachable(address, error) from error
    return ray, True


def _answers(address: str) -> None:
    """See that something listens there; Ray itself would wait for minutes, or end the process."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: BaseException) -> StudyError:
    return StudyError(
        "There is no Ray cluster at this address, or it does not answer",
        where=address,
        expected="'ray', 'auto', HOST:PORT of a head node, or ray://HOST:PORT",
        received=str(error).splitlines()[0] if str(error) else type(error).__name__,
        remedy="see that 'ray start --head' runs there, the port can be reached from here, and "
        "RAY_AUTH_MODE and the token here are the cluster's",
    )


def _lost(error: BaseException) -> BaseException:
    if isinstance(error, OSError | StudyError):
        return error
    return StudyError(
        "The connection to the Ray cluster was lost",
        received=str(error).splitlines()[0] if str(error) else type(error).__name__,
        remedy="run the study again: finished trials are kept",
    )


def _key(spec: Spec) -> tuple[str, int]:
    return spec.position, spec.seed
