"""The statistics of a data set, and how far a model was from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from truenorm._errors import DataError
from truenorm._moments import Moments
from truenorm._tables import NOT_DATA, Record, Table, number


@dataclass(frozen=True)
class Population(Record):
    """The moments of every BatchNormalization's input over a data set.

    Args:
        sites: Moments per layer path (all calls of a shared layer together).
        samples: Samples seen.
        batches: Batches seen.
        upstream: Which statistics the layers before a site used: ``batch``, ``population`` or
            ``moving``.
        passes: How often the data was read.
    """

    sites: Mapping[str, Moments]
    samples: int
    batches: int
    upstream: str
    passes: int

    def merge(self, other: Population) -> Population:
        """The population of both data sets together."""
        ours, theirs = (
            {path: f"{len(moments.mean)} channels" for path, moments in one.sites.items()}
            | {"upstream": one.upstream}
            for one in (self, other)
        )
        differ = sorted(p for p in {*ours, *theirs} if ours.get(p) != theirs.get(p))
        if differ:
            raise DataError(
                "Two populations can be merged only if they are of the same model and upstream",
                where=differ[0],
                expected=ours.get(differ[0], "no such site"),
                received=theirs.get(differ[0], "no such site"),
            )
        return Population(
            {path: moments.merge(other.sites[path]) for path, moments in self.sites.items()},
            self.samples + other.samples,
            self.batches + other.batches,
            self.upstream,
            max(self.passes, other.passes),
        )

    def tables(self) -> Sequence[Table]:
        """One row per site."""
        rows = tuple(
            (
                path,
                str(len(m.mean)),
                number(float(m.count.max(initial=0)), 9),
                number(float(np.abs(m.mean).max(initial=0))),
                number(float(m.standard_deviation.min(initial=math.inf))),
                number(float(m.standard_deviation.max(initial=0))),
            )
            for path, m in self.sites.items()
        )
        return (
            Table(
                f"Population over {self.samples} samples in {self.batches} batches "
                f"(upstream: {self.upstream}, passes: {self.passes})",
                (
                    "layer",
                    "channels",
                    "values per channel",
                    "largest |mean|",
                    "least std",
                    "largest std",
                ),
                rows,
            ),
        )


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


@dataclass(frozen=True)
class Recalibration(Record):
    """Moving statistics replaced by the population's; what was before can be put back.

    Args:
        population: The statistics that the layers have now.
        before: Per layer, the gap between its old statistics and the population.
        undo: Call it to put the old statistics back, bit for bit.
    """

    population: Population
    before: tuple[Gap, ...]
    undo: Callable[[], None] = field(repr=False, compare=False, metadata=NOT_DATA)

    def tables(self) -> Sequence[Table]:
        """One row per layer."""
        rows = tuple((g.path, number(g.mean), number(g.scale)) for g in self.before)
        title = f"Recalibrated {len(rows)} layers over {self.population.samples} samples"
        columns = ("layer", "mean was off by (std)", "scale was off by (doublings)")
        return (Table(title, columns, rows),)
