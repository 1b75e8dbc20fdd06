"""Two processes that run one program over loopback, started and ended here."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path


def run(program: Path, out: Path) -> Path:
    """Run it as ranks 0 and 1, each given its rank, the folder for results and two free ports."""
    held = [socket.socket() for _ in range(2)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    running = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(out), *ports],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return out
