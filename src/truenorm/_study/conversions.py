"""Variants with another layer in the place of BatchNormalization, by name: ``group:16``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast, get_args

from truenorm._checks import meant
from truenorm._errors import ModelError, OptionError
from truenorm._records.rewrite import Rewrite
from truenorm._records.tables import counted
from truenorm._rewrites.replace import replace
from truenorm._rewrites.targets import GROUPS, To

NAMES: tuple[str, ...] = get_args(To)


class Conversion(NamedTuple):
    """What a name says: see :func:`truenorm.replace`."""

    to: To
    groups: int | None

    def of(self, model: Any) -> Rewrite:
        """The rewrite of a model."""
        return replace(model, to=self.to, groups=self.groups, progress=False)


def conversion_of(name: str) -> Conversion | None:
    """The conversion that this names; None if it names something else.

    Raises:
        OptionError: It is a conversion misspelt.
    """
    to, colon, number = name.partition(":")
    if to in NAMES and not colon:
        return Conversion(cast(To, to), None)
    if to == "group" and number.isdecimal() and number.isascii():
        return Conversion("group", int(number))
    remedy = meant(to, NAMES)
    if to in NAMES or remedy:
        raise OptionError(
            "There is no such variant",
            where="variants",
            expected=f"a position, {', '.join(NAMES)}, or group:{GROUPS}, with a number of groups",
            received=repr(name),
            remedy=remedy,
        )
    return None


def check_conversions(model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """See that the conversions can be had; sentences come back about sites that stay."""
    notes: list[str] = []
    for name in names:
        conversion = conversion_of(name)
        done = None if conversion is None else conversion.of(model)
        if done is None or not done.left:
            continue
        if not done.changed:
            raise ModelError(
                f"No BatchNormalization of this model can be converted to {name}",
                where=done.left[0].path,
                received=done.left[0].reason,
            )
        listed = ", ".join(one.path for one in done.left[:5]) + " …" * (len(done.left) > 5)
        notes.append(
            f"With {name}, {counted(len(done.left), 'BatchNormalization site')} could not be "
            f"converted, and nothing is changed there: {listed}."
        )
    return tuple(notes)
