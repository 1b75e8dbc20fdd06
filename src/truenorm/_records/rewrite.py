"""New models, each with its receipt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from truenorm._records.tables import NOT_DATA, Record, Table, number


@dataclass(frozen=True)
class Change:
    """A site that a rewrite changed, and how."""

    path: str
    what: str


@dataclass(frozen=True)
class Rewrite(Record):
    """A new model and its receipt; the model given is unchanged.

    Args:
        model: The new Keras model.
        kind: What was done: ``replace``, ``place`` or ``fold``, with its target.
        changed: Every site changed.
        left: Every site left, with its reason.
        max_abs_error: Largest absolute difference of an output on the probe, in the output's
            units; None where the rewrite is not meant to keep the function.
        max_rel_error: The same over the largest magnitude of that output; a plain number.
        max_site_error: Largest difference at a changed site by itself, on random numbers, over the
            range that the values of the same channel have there; a plain number.
        notes: What the user must know about the new model.
    """

    model: Any = field(repr=False, compare=False, metadata=NOT_DATA)
    kind: str
    changed: tuple[Change, ...]
    left: tuple[Left, ...]
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    max_site_error: float | None = None
    notes: tuple[str, ...] = ()

    def tables(self) -> Sequence[Table]:
        """The receipt."""
        total = len(self.changed) + len(self.left)
        notes = list(self.notes)
        if self.max_site_error is not None:
            notes.insert(
                0,
                "Largest difference at a changed site, by itself on random numbers: "
                f"{number(self.max_site_error)} of the range of its channel.",
            )
        if self.max_rel_error is not None:
            notes.insert(
                0,
                f"Largest difference of the outputs: {number(self.max_abs_error)} absolute, "
                f"{number(self.max_rel_error)} relative.",
            )
        rows = [(c.path, "changed", c.what) for c in self.changed]
        rows += [(k.path, "left", k.reason) for k in self.left]
        title = f"{self.kind}: {len(self.changed)} of {total} sites changed"
        return (Table(title, ("site", "result", "how / why"), tuple(rows), tuple(notes)),)


@dataclass(frozen=True)
class Left:
    """A site that a tool left as it was, and why."""

    path: str
    reason: str
