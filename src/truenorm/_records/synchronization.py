"""Moving statistics that several replicas have made one and the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from truenorm._records.recalibration import Gap
from truenorm._records.tables import NOT_DATA, Record, Table, counted, number


@dataclass(frozen=True, repr=False)
class Synchronization(Record):
    """What the replicas of a training had in the place of one model's moving statistics.

    Args:
        counts: What each replica's statistics counted for, process by process; one number where
            there is one.
        drift: Per layer, how far this process's statistics were from those that all have now; of
            several replicas the farthest.
        undo: Call it to put this process's own statistics back, bit for bit.
        replicas: How many replicas each process has.
    """

    counts: tuple[int, ...]
    drift: tuple[Gap, ...]
    undo: Callable[[], None] = field(repr=False, compare=False, metadata=NOT_DATA)
    replicas: int = 1

    def summary(self) -> str:
        """How many replicas and layers."""
        return f"of {self._all()}, {counted(len(self.drift), 'layer')}"

    def tables(self) -> Sequence[Table]:
        """One row per layer; none where there was nothing to do."""
        if len(self.counts) == 1:
            title = "Nothing to synchronize: this process is alone, and its statistics stay"
            return (Table(title, (), ()),)
        rows = tuple((gap.path, number(gap.mean), number(gap.scale)) for gap in self.drift)
        title = f"Moving statistics of {self._all()} made one, in {counted(len(rows), 'layer')}"
        columns = ("layer", "mean was off by (std)", "scale was off by (doublings)")
        weights = f"They counted for {', '.join(map(str, self.counts))}."
        return (Table(title, columns, rows, (weights,)),)

    def _all(self) -> str:
        return counted(len(self.counts), "process" if self.replicas == 1 else "replica")
