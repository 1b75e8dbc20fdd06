"""The one check of arguments that count something: a batch size, a number of epochs."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from truenorm._errors import OptionError


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
