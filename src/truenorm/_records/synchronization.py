"""Moving statistics that several processes have made one and the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from truenorm._records.recalibration import Gap
from truenorm._records.tables import NOT_DATA, Record, Table, counted, number


@dataclass(frozen=True, repr=False)
class Synchronization(Record):
    """What the processes of a training had in the place of one model's moving statistics.

    Args:
        counts: What each process's statistics counted for; one number where there is one process.
        drift: Per layer, how far this process's statistics were from those that all have now.
        undo: Call it to put this process's own statistics back, bit for bit.
    """

    counts: tuple[int, ...]
    drift: tuple[Gap, ...]
    undo: Callable[[], None] = field(repr=False, compare=False, metadata=NOT_DATA)

    def summary(self) -> str:
        """How many processes and layers."""
        processes, layers = len(self.counts), len(self.drift)
        return f"of {counted(processes, 'process')}, {counted(layers, 'layer')}"

    def tables(self) -> Sequence[Table]:
        """One row per layer; none where there was nothing to do."""
        if len(self.counts) == 1:
            title = "Nothing to synchronize: this process is alone, and its statistics stay"
            return (Table(title, (), ()),)
        rows = tuple((gap.path, number(gap.mean), number(gap.scale)) for gap in self.drift)
        title = f"Moving statistics of {len(self.counts)} processes made one, in {len(rows)} layers"
        columns = ("layer", "mean was off by (std)", "scale was off by (doublings)")
        weights = f"They counted for {', '.join(map(str, self.counts))}."
        return (Table(title, columns, rows, (weights,)),)
