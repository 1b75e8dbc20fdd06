"""What an error becomes: one line on the standard error stream, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import NoReturn

from truenorm._cli.apart import is_apart
from truenorm._errors import TruenormError, is_out_of_memory
from truenorm._records.tables import printable


@contextmanager
def refusing() -> Generator[None]:
    """An error inside becomes one line and exit code 2, Ctrl-C exit code 130."""
    escape = getattr(sys.stdout, "reconfigure", None)
    if escape is not None:  # a pipe of Windows does not hold every character
        escape(errors="backslashreplace")  # as standard error has it
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout = None  # nothing is flushed at exit
        sys.exit(1)
    except MemoryError:
        if is_apart():
            raise  # it says which limit was reached
        refuse("There is not enough memory to run this model.")
    except TruenormError as error:
        from truenorm._cli.remedies import in_commands

        refuse(in_commands(str(error)))


@contextmanager
def within(file: str, memory: int) -> Generator[None]:
    """In the separate process: what is said if there is not enough memory for this file."""
    from truenorm.archive import _isolation

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        refuse(str(_isolation.too_much_memory(file, memory)))


def refuse(message: str) -> NoReturn:
    """Say it, and end with exit code 2."""
    print(f"truenorm: {printable(message)}", file=sys.stderr)
    sys.exit(2)
