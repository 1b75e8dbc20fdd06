"""What a change of the freeze policy did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from truenorm._records.tables import NOT_DATA, Record, Table, counted, grouped


@dataclass(frozen=True)
class Frozen:
    """A layer whose freeze policy was set.

    Args:
        path: The layer's path.
        before: Its policy until then.
        after: Its policy since.
    """

    path: str
    before: str
    after: str


@dataclass(frozen=True, repr=False)
class Freezing(Record):
    """Freeze policies set; the earlier state can be put back.

    Args:
        layers: Every layer asked for.
        notes: What must be known about the effect.
        undo: Call it to put the flags of these layers back as they were, to the last variable.
    """

    layers: tuple[Frozen, ...]
    notes: tuple[str, ...] = ()
    undo: Callable[[], None] = field(repr=False, compare=False, metadata=NOT_DATA, kw_only=True)

    def summary(self) -> str:
        """How many layers."""
        return f"of {counted(len(self.layers), 'layer')}"

    def tables(self) -> Sequence[Table]:
        """One row per group of layers with the same change."""
        rows = grouped((one.path, (one.before, one.after)) for one in self.layers)
        title = f"Freeze policy {self.summary()}"
        return (Table(title, ("layers", "was", "is"), rows, self.notes),)
