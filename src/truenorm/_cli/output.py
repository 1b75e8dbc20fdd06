"""What the commands say: results on the standard output stream, all else on the standard error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from truenorm._cli.apart import handed_over
from truenorm._records.tables import Record, printable
from truenorm._records.terminal_width import terminal_width


def show(record: Record, *, as_json: bool) -> None:
    """Print a record, and flush: if the reader has closed the pipe, the error is raised here."""
    if as_json:
        text = record.to_json()
        if (sys.stdout.encoding or "utf-8").lower() != "utf-8":  # JSON is UTF-8; so is ASCII
            text = json.dumps(json.loads(text), indent=2)
        print(text)
    else:
        from rich.console import Console

        Console(highlight=False, width=terminal_width()).print(record, soft_wrap=True)
    sys.stdout.flush()


def note(text: str) -> None:
    """Say something beside the result."""
    print(f"truenorm: {printable(text)}", file=sys.stderr)


def write(model: Any, out: Path, *, as_json: bool) -> None:
    """Save a model, and say so if the output is for people."""
    from truenorm.archive import save

    elsewhere = handed_over()
    save(model, elsewhere or out)
    if not as_json and elsewhere is None:
        print(f"Saved as {printable(str(out))}")
        sys.stdout.flush()
