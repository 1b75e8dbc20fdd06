"""Two processes that run one program over loopback, started and ended here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

Process: TypeAlias = "subprocess.Popen[str]"


@contextmanager
def started(program: Path, argument: str, **environment: str) -> Generator[list[Process]]:
    """Start it as ranks 0 and 1, each given its rank, the argument and two free ports."""
    held = [socket.socket() for _ in range(2)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), str(rank), argument, *ports],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},  # not for two of them
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        yield running
    finally:
        for process in running:
            with process:
                process.kill()


def run(program: Path, out: Path) -> Path:
    """Run it to its end, with the folder for results as its argument."""
    with started(program, str(out)) as running:
        said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return out
