"""A program in another process of this Python, with the environment of this one."""

from __future__ import annotations

import os
import subprocess
import sys


def output_of(program: str, *arguments: object) -> str:
    """What it prints, without the space around it; where it fails, the test does, and says why."""
    line = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def truenorm_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with these arguments, however it ends."""
    return subprocess.run(
        [sys.executable, "-m", "truenorm", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
