"""How far moving statistics were from the population's, and are now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from truenorm._records.population import Population
from truenorm._records.tables import NOT_DATA, Record, Table, counted, number


@dataclass(frozen=True)
class Gap:
    """How far a layer's moving statistics are from a population.

    Args:
        path: The layer's path.
        mean: Largest ``|moving_mean - mean| / sqrt(variance + epsilon)`` over the channels: in
            standard deviations of the layer's input.
        scale: Largest ``|log2((moving_variance + epsilon) / (variance + epsilon))| / 2`` over the
            channels: in doublings of the output's scale; 0 is right, 1 is a factor of two.
    """

    path: str
    mean: float
    scale: float


@dataclass(frozen=True, repr=False)
class Recalibration(Record):
    """Moving statistics replaced by the population's; what was before can be put back.

    Args:
        population: The statistics that the layers have now.
        before: Per layer, the gap between its old statistics and the population.
        after: Per layer, the gap that is left: rounding to the variables' dtype, and channels of
            which the data has too few values.
        undo: Call it to put the old statistics back, bit for bit.
    """

    population: Population
    before: tuple[Gap, ...]
    after: tuple[Gap, ...]
    undo: Callable[[], None] = field(repr=False, compare=False, metadata=NOT_DATA)

    def summary(self) -> str:
        """How many layers, over how much data."""
        layers, samples = len(self.before), self.population.samples
        return f"of {counted(layers, 'layer')} over {counted(samples, 'sample')}"

    def tables(self) -> Sequence[Table]:
        """One row per layer."""
        rows = tuple(
            (b.path, number(b.mean), number(a.mean, 1), number(b.scale), number(a.scale, 1))
            for b, a in zip(self.before, self.after, strict=True)
        )
        error = max(self.population.standard_errors().values(), default=None)
        title = f"Recalibrated {self.summary().removeprefix('of ')}"
        columns = (
            "layer",
            "mean was off by (std)",
            "now",
            "scale was off by (doublings)",
            "now",
        )
        notes = (
            f"Largest standard error of the statistics: {number(error, 2)} standard deviations.",
        )
        return (Table(title, columns, rows, () if error is None else notes),)
