"""New models, each with its receipt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from truenorm._records.tables import NOT_DATA, Record, Table, counted, joined, number


@dataclass(frozen=True)
class Change:
    """A site that a rewrite changed, and how.

    Args:
        path: The site.
        what: How it was changed.
        kind: The same in the words that all alike share: classes of layers without their names.
    """

    path: str
    what: str
    kind: str = ""


@dataclass(frozen=True, repr=False)
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

    def summary(self) -> str:
        """What was done, at how many sites."""
        total = len(self.changed) + len(self.left)
        return f"{self.kind}: {len(self.changed)} of {counted(total, 'site')} changed"

    def tables(self) -> Sequence[Table]:
        """The receipt: one row for all sites of which the same can be said."""
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
        rows = _grouped("changed", [(c.path, c.what, c.kind) for c in self.changed])
        rows += _grouped("left", [(k.path, k.reason, k.kind) for k in self.left])
        columns = ("sites", "result", "how / why") if rows else ()
        return (Table(self.summary(), columns, tuple(rows), tuple(notes)),)


def _grouped(result: str, sites: Sequence[tuple[str, str, str]]) -> list[tuple[str, ...]]:
    """One row for sites of a kind; in full, where there is but one."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for path, said, kind in sites:
        alike.setdefault(kind or said, []).append((path, said))
    return [
        (
            joined([path for path, _ in group]),
            result,
            kind if len({said for _, said in group}) > 1 else group[0][1],
        )
        for kind, group in alike.items()
    ]


@dataclass(frozen=True)
class Left:
    """A site that a tool left as it was, and why.

    Args:
        path: The site.
        reason: Why.
        kind: The same in the words that all alike share: classes of layers without their names.
    """

    path: str
    reason: str
    kind: str = ""
