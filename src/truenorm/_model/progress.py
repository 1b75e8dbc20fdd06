"""One line on the standard error stream that says how far something is.

On a terminal and in a notebook it is shown unless it is not wanted, elsewhere only if it is asked
for. It is one line that is written over and wiped at the end, which every terminal and notebook can
do: rich needs ipywidgets in a notebook, and Keras's bar goes to the standard output stream, where
the results are.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from truenorm._errors import OptionError
from truenorm._records.tables import printable

Wanted = bool | None
"""Whether progress is shown; None: on a terminal and in a notebook."""

BEGIN = "\x1etruenorm: "
"""How a line of progress begins that one process tells another, which shows it."""

_EVERY, _QUIET = 0.1, 0.5
"""Seconds from one showing to the next; and until the first, so that nothing flickers."""

_tells_another = False


class Line:
    """A line that is written over.

    Args:
        what: What goes on, as its first word.
        quiet: Seconds until it is first shown.
    """

    def __init__(self, what: str, quiet: float = 0.0) -> None:
        self._what, self._begun = what, time.monotonic()
        self._next, self._shown = self._begun + quiet, 0

    def begin(self) -> None:
        """Something begins of which the whole is known: the time left is counted from here."""
        self._begun = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to show something new."""
        return time.monotonic() >= self._next

    def step(self, text: str) -> None:
        """Show at once what comes now, which may take a while."""
        self.begin()
        self._write(f"{self._what}: {text}")

    def tell(self, text: str, share: float | None = None) -> None:
        """Show how far it is, if it is time to.

        Args:
            text: In words.
            share: Which part of it is done, from 0 to 1, if that is known.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY
        done = ""
        if share:
            left = duration((now - self._begun) * (1 - share) / share)
            done = f" ({share:.0%}, about {left} left)"
        self._write(f"{self._what}{done}: {text}")

    def relay(self, said: str) -> bool:
        """Show what another process has told of its progress; whether this was such a line."""
        if not said.startswith(BEGIN):
            return False
        text = printable(said.removeprefix(BEGIN).rstrip("\n"))
        if text:
            self._write(text)
        else:
            self.wipe()
        return True

    def wipe(self) -> None:
        """Leave the line as it was found."""
        if self._shown and _tells_another:
            self._write("")
        elif self._shown:
            sys.stderr.write(f"\r{' ' * self._shown}\r")
            sys.stderr.flush()
        self._shown = 0

    def _write(self, text: str) -> None:
        """Show this in the place of what was shown before."""
        if _tells_another:
            print(f"{BEGIN}{text}", file=sys.stderr, flush=True)
        else:
            text = text[: _columns() - 1]
            sys.stderr.write(f"\r{text.ljust(self._shown)}")
            sys.stderr.flush()
        self._shown = len(text)


def _columns() -> int:
    """How wide the terminal is; the standard output stream may be another, or a pipe."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal, or no stream of a file
        return shutil.get_terminal_size().columns


class _Nothing(Line):
    """Shows nothing."""

    def due(self) -> bool:
        return False

    def step(self, text: str) -> None:
        pass

    def tell(self, text: str, share: float | None = None) -> None:
        pass


NOWHERE: Line = _Nothing("")
"""A line that nobody sees."""


@contextmanager
def shown(wanted: Wanted, what: str) -> Generator[Line]:
    """A line for as long as the block is open.

    Raises:
        OptionError: ``wanted`` is neither a boolean nor None.
    """
    if not is_shown(wanted):
        yield NOWHERE
        return
    line = Line(what, 0.0 if wanted else _QUIET)
    try:
        yield line
    finally:
        line.wipe()


def counted_batches(
    batches: Iterable[Any], line: Line, what: str, total: int | None
) -> Iterator[Any]:
    """The batches; the line says which is read, and of how many if that is known."""
    line.begin()
    for number, batch in enumerate(batches, start=1):
        yield batch
        of, share = ("", None) if not total else (f" of {total}", min(number / total, 1.0))
        line.tell(f"{what}, batch {number}{of}", share)


def is_shown(wanted: Any) -> bool:
    """Whether progress is shown."""
    if wanted is not None and not isinstance(wanted, bool):
        raise OptionError(
            "Whether progress is shown is said by a boolean",
            where="progress",
            expected="True, False, or None for on a terminal and in a notebook",
            received=repr(wanted),
        )
    return (_tells_another or is_terminal() or is_notebook()) if wanted is None else wanted


def is_terminal() -> bool:
    """Whether the standard error stream is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def is_notebook() -> bool:
    """Whether this is the process of a notebook."""
    return "ipykernel" in sys.modules


def tell_another_process() -> None:
    """From here on every line goes to the process that started this one, by :data:`BEGIN`."""
    global _tells_another
    _tells_another = True


def duration(seconds: float) -> str:
    """A time in words that are short."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
