"""The errors that truenorm raises.

::

    TruenormError
    ├── ModelError (ValueError)         the model cannot be handled: no BN, subclassed, not built
    ├── VerificationError               a rewrite changed outputs that it had to keep
    ├── ArchiveError (ValueError)       a .keras file is damaged, or asks for what is not safe
    ├── DataError (ValueError)          the data given is empty, of the wrong shape, not numbers
    ├── OptionError (ValueError)        an argument has a value that is not one of those possible
    ├── MissingDependencyError (ImportError)  an optional package is not installed
    ├── KerasVersionError (RuntimeError)      this Keras lacks what a tool relies on
    ├── OutputError (OSError)           a file or folder cannot be written as asked
    ├── StudyError (RuntimeError)       an experiment could not be run to its end
    └── DistributedError (RuntimeError) replicas that must go together do not

Each message says the problem, the place, what was expected, what came, and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any


class TruenormError(Exception):
    """Base of every error that truenorm raises on purpose.

    The message is composed from named parts, so that no part is forgotten and all errors read
    alike. The parts are attributes too, and survive pickling (an error may come from another
    process).

    Args:
        problem: What is wrong, as one sentence without its full stop.
        where: The path of the layer, site, file or argument concerned.
        expected: What would have been right.
        received: What came instead.
        remedy: What the user can do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        received: str | None = None,
        remedy: str | None = None,
    ) -> None:
        parts = [f"{problem}." if where is None else f"{problem} (at '{where}')."]
        if expected is not None:
            parts.append(f"Expected: {expected}.")
        if received is not None:
            parts.append(f"Received: {received}.")
        if remedy is not None:
            parts.append(f"Remedy: {remedy}.")
        super().__init__(" ".join(parts))
        self.problem = problem
        self.where = where
        self.expected = expected
        self.received = received
        self.remedy = remedy

    def __reduce__(self) -> tuple[Callable[[], TruenormError], tuple[()], dict[str, Any]]:
        # Exception's own would call the class with the whole message as the problem.
        parts = {name: getattr(self, name) for name in _PARTS}
        return partial(type(self), **parts), (), self.__dict__


_PARTS = ("problem", "where", "expected", "received", "remedy")


class ModelError(TruenormError, ValueError):
    """The model cannot be handled: it has no BatchNormalization, is subclassed, is not built."""


class VerificationError(TruenormError):
    """A rewrite that must keep the model's function did not keep it; no model is returned."""


class ArchiveError(TruenormError, ValueError):
    """A ``.keras`` file is damaged, or is not safe to open."""


class DataError(TruenormError, ValueError):
    """The data is empty, of the wrong shape, or not what the model takes."""


class OptionError(TruenormError, ValueError):
    """An argument has a value that is not one of those possible."""


class MissingDependencyError(TruenormError, ImportError):
    """An optional package is needed and not installed."""


class KerasVersionError(TruenormError, RuntimeError):
    """The installed Keras does not have something that a tool relies on."""


class OutputError(TruenormError, OSError):
    """A file or folder cannot be written as asked."""


class StudyError(TruenormError, RuntimeError):
    """An experiment could not be run to its end."""


class DistributedError(TruenormError, RuntimeError):
    """The replicas of a distributed run that must go together do not."""


_OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED",
    "can't allocate memory",
    "Out of memory",
    "OOM when",
    "bad_alloc",
    "Unable to allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python or a framework says that there is no memory."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def in_one_line(error: Exception) -> str:
    """What an error says, on one line, without what Keras and TensorFlow put around it."""
    if isinstance(error, TruenormError):
        return str(error)
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).split("Arguments received by")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    if lines[0].startswith("Exception encountered when calling"):
        lines = lines[1:] or lines
    said = lines[-1 if lines[0].startswith("in user code:") else 0]
    name = type(error).__name__
    return said if said.startswith(f"{name}: ") else f"{name}: {said}"
