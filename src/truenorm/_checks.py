"""Checks of arguments: what counts something, and what is misspelt."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from truenorm._errors import OptionError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def check_integer(name: str, value: Any, *, least: int = 1) -> int:
    """The argument as an int.

    Args:
        name: The argument's name, for the message.
        value: What was given; NumPy's integers are integers too, booleans are not.
        least: The smallest value allowed, 0 or 1.

    Raises:
        OptionError: It is not an integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        wanted = "a positive integer" if least else "0 or a positive integer"
        raise OptionError(f"{name} must be {wanted}", received=repr(value))
    return int(value)


def is_number(value: Any) -> bool:
    """Whether this is a real number, NumPy's included; booleans are not."""
    return not isinstance(value, bool) and isinstance(value, Real)


def known_options(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function; an option that it does not have is answered with the one that was meant."""

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        check_options(kwargs, function)
        return function(*args, **kwargs)

    return checked


def check_options(names: Iterable[str], function: Callable[..., Any]) -> None:
    """Refuse options that a function does not have."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in names:
        if name not in known:
            raise OptionError(
                "There is no such option",
                where=name,
                expected=", ".join(known),
                remedy=meant(name, known),
            )


def meant(given: Any, choices: Iterable[str], *, alike: float = 0.7) -> str | None:
    """The remedy for something misspelt: what was probably meant; None if nothing is alike."""
    close = difflib.get_close_matches(str(given), list(choices), n=1, cutoff=alike)
    return f"write {close[0]}" if close else None
