"""Headless Chromium as the tests see it: what a page became, what it said, how it looked."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
NEEDS_CHROMIUM = "Chromium is not installed"

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
)
_CONSOLE = re.compile(r":CONSOLE[:(]\d+\)?\] (.*)")


@dataclass(frozen=True)
class Visit:
    """One visit of a page: the document after loading, and the lines of its console."""

    dom: str
    console: tuple[str, ...]


def visit(
    page: Path,
    *,
    picture: Path | None = None,
    size: tuple[int, int] = (1280, 900),
    dark: bool = False,
) -> Visit:
    """Load a local page in a fresh profile; take its picture if a path is given for one."""
    assert CHROMIUM is not None, NEEDS_CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        run = subprocess.run(
            [
                CHROMIUM,
                *_FLAGS,
                f"--user-data-dir={profile}",
                f"--window-size={size[0]},{size[1]}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                *([f"--screenshot={picture}"] if picture else ["--dump-dom"]),
                page.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    if run.returncode:
        raise RuntimeError(f"Chromium ended with {run.returncode}: {run.stderr[-2000:]}")
    return Visit(run.stdout, tuple(_CONSOLE.findall(run.stderr)))
