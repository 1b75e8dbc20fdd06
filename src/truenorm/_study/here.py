"""Trials in this process, one after the other."""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truenorm._errors import OutputError
from truenorm._records.files import replacing
from truenorm._study.folder import Spec, read_data, write_result
from truenorm._study.plan import read_plan
from truenorm._study.pool import Event, failed


class Here:
    """Runs trials in a thread of this process.

    For models that train in seconds, where starting a process takes longer than the training. A
    trial that ends the process ends the study; memory and time are those of the whole process.

    Args:
        folder: The study's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._folder = folder
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self, todo: Sequence[Spec]) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, args=(todo,), daemon=True)
        self._thread.start()

    def _run(self, todo: Sequence[Spec]) -> None:
        spec = todo[0]
        try:
            plan, data = read_plan(self._folder), read_data(self._folder)
            for spec in todo:
                self._trial(plan, data, spec)
                if self._stopped:
                    return
        except BaseException as error:  # raised again in the waiting thread
            self.events.put(("crashed", spec, os.getpid(), error))

    def _trial(self, plan: Any, data: Any, spec: Spec) -> None:
        from truenorm._study import trial

        begun, pid = time.monotonic(), os.getpid()
        self.events.put(("started", spec, pid, None))

        def tell(epoch: int, metrics: dict[str, float]) -> None:
            if self._stopped:
                raise KeyboardInterrupt
            self.events.put(("epoch", spec, pid, {"epoch": epoch, "metrics": metrics}))

        def save(model: Any) -> str:
            with replacing(self._folder / spec.file(".keras")) as temporary:
                model.save(temporary)
            return spec.file(".keras")

        try:
            done = trial.run(trial.Training(plan, spec, data), tell, save)
        except OutputError:  # of ours: the disk is full
            raise
        except Exception as error:  # whatever the user's model or data raises
            done = failed(
                spec,
                f"the trial raised {type(error).__name__}",
                seconds=time.monotonic() - begun,
                lines=traceback.format_exc().strip().splitlines()[-8:],
            )
        else:
            write_result(self._folder, spec, done)
        self.events.put(("ended", spec, pid, done))

    def stop(self) -> None:
        """End at the next epoch of the trial that runs."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join()
