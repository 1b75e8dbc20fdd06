"""One of two processes that collect statistics together, of which the second dies: as a program.

``python lost_collector.py RANK "" PORT PORT``: the first writes to its output how it ended.
"""

from __future__ import annotations

import os
import signal
import sys

import collecting_process as processes

import truenorm as tn


def main(rank: str, _: str, *ports: str) -> None:
    scope = processes.start(int(rank), list(ports))
    scope.__enter__()  # and never left: the other process is gone by then
    model, x = processes.model(), processes.data()
    tn.collect(model, x, batch_size=8)
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        tn.collect(model, x, batch_size=8)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
