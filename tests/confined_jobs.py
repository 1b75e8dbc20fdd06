"""What a confined process is asked to do in the tests: each function tries something."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (OSError, MemoryError) as error:
        return type(error).__name__
    return "done"


def attempts(folder: str, *, outside: str, parent: int) -> None:
    """Everything that must not be possible, and what must."""
    own, foreign = Path(folder), Path(outside)

    def connect() -> None:
        with socket.create_connection(("127.0.0.1", 9), timeout=1):
            pass

    def overwrite() -> None:
        with (foreign / "there").open("r+b") as file:
            file.write(b"x")

    tried = {
        "write in the folder": lambda: (own / "a").write_bytes(b"x"),
        "rename in the folder": lambda: (own / "a").rename(own / "b"),
        "write to nothing": lambda: Path("/dev/null").write_bytes(b"x"),
        "read outside": lambda: (foreign / "there").read_bytes(),
        "a little memory": lambda: bytearray(2**24),
        "write outside": lambda: (foreign / "new").write_bytes(b"x"),
        "overwrite outside": overwrite,
        "truncate outside": lambda: os.truncate(foreign / "there", 0),
        "delete outside": lambda: (foreign / "there").unlink(),
        "move outside": lambda: (own / "b").rename(foreign / "b"),
        "link outside": lambda: (foreign / "link").symlink_to("/"),
        "connect": connect,
        "a socket of the machine": lambda: socket.socket(socket.AF_UNIX),
        "end the parent": lambda: os.kill(parent, 0),
        "much memory": lambda: bytearray(2**30),
    }
    outcomes = {name: _outcome(attempt) for name, attempt in tried.items()}
    (own / "outcomes.json").write_text(json.dumps(outcomes))


def sleep(folder: str) -> None:
    """Never come to an end."""
    del folder
    time.sleep(600)


def abort(folder: str) -> None:
    """End as a fault in C code does, with words on the way."""
    del folder
    os.write(2, b"terminate called after throwing\n" * 100_000)
    os.kill(os.getpid(), signal.SIGABRT)


def fail(folder: str) -> None:
    """Raise what nothing expects."""
    raise KeyError(folder)


def nothing_open(folder: str) -> None:
    """Fail if there is more open than the three standard streams."""
    found = {int(one) for one in os.listdir("/proc/self/fd")}  # noqa: PTH208
    found = {one for one in found if os.path.exists(f"/proc/self/fd/{one}")}  # noqa: PTH110
    assert found <= {0, 1, 2}, (folder, found)


def fail_without_a_word(folder: str) -> None:
    """Raise where nothing can be written of it."""
    os.close(2)
    raise KeyError(folder)


def outlive_exceptions(folder: str) -> None:
    """Go on after whatever a handler of signals may raise."""
    del folder
    for _ in range(2):
        with suppress(Exception):
            time.sleep(60)
