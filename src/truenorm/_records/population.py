"""The statistics of a data set, and how far a model was from them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from truenorm._errors import DataError
from truenorm._records import population_file as storage
from truenorm._records.drawings.before_after import Rows, Span
from truenorm._records.drawings.drawing import Drawing, Drawn
from truenorm._records.moments import ROWS, Moments, Spread, from_rows, to_rows
from truenorm._records.tables import Record, Table, counted, number


@dataclass(frozen=True, repr=False)
class Population(Record, Drawn):
    """The moments of every BatchNormalization's input over a data set.

    Args:
        sites: Moments per layer path (all calls of a shared layer together).
        samples: Samples seen.
        batches: Batches seen.
        upstream: Which statistics the layers before a site used: ``batch``, ``population`` or
            ``moving``.
        passes: How often the data was read.
        spread: How much the batches differ, per layer path: how large the standard errors are.
        agreement: With ``upstream="population"``, how far these statistics are from what was seen
            while the layers used them: the largest difference of any mean in standard deviations,
            or of any variance relative to it.
    """

    sites: Mapping[str, Moments]
    samples: int
    batches: int
    upstream: str
    passes: int
    spread: Mapping[str, Spread] = field(default_factory=dict[str, Spread])
    agreement: float | None = None

    def merge(self, other: Population) -> Population:
        """The population of both data sets together; in any order, up to rounding.

        With ``upstream="population"`` each part was collected with its own population upstream;
        only processes that collect together use one and the same.

        Raises:
            DataError: They are not of the same layers, or not of the same upstream.
        """
        ours, theirs = (
            {path: counted(len(moments.mean), "channel") for path, moments in one.sites.items()}
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
        both = self.spread.keys() & other.spread.keys()
        agreements = [a for a in (self.agreement, other.agreement) if a is not None]
        return Population(
            {path: moments.merge(other.sites[path]) for path, moments in self.sites.items()},
            self.samples + other.samples,
            self.batches + other.batches,
            self.upstream,
            max(self.passes, other.passes),
            {p: one.merge(other.spread[p]) for p, one in self.spread.items() if p in both},
            max(agreements, default=None),
        )

    def standard_errors(self) -> dict[str, float]:
        """How far each layer's statistics may be off because the data is only a sample.

        Per layer path, the root mean square over the channels of the standard error of the mean (in
        standard deviations) or of the standard deviation (relative), whichever is larger. It is
        estimated from how much batches differ, so it holds for batches drawn at random; infinite
        for a single batch.
        """
        return {
            path: spread.standard_error(self.sites[path]) for path, spread in self.spread.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file (NumPy's ``.npz``), bit for bit and whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        description = {name: getattr(self, name) for name in _FACTS}
        description["sites"] = [[p, len(m.mean), p in self.spread] for p, m in self.sites.items()]
        values = [to_rows(m, self.spread.get(p)) for p, m in self.sites.items()]
        storage.write(path, description, np.concatenate([np.zeros((ROWS, 0)), *values], axis=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Population:
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Raises:
            DataError: The file is not there, not whole, or not a population.
        """
        description, values = storage.read(path)
        try:
            facts = {name: description[name] for name in _FACTS}
            listed = [(str(p), int(n), bool(has)) for p, n, has in description["sites"]]
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise storage.unreadable(path, f"{type(error).__name__}: {error}") from error
        kinds = {"samples": int, "batches": int, "passes": int, "upstream": str}
        wrong = [name for name, kind in kinds.items() if type(facts[name]) is not kind]
        if not isinstance(facts["agreement"], float | None):
            wrong.append("agreement")
        ends = np.cumsum([0, *(n for _, n, _ in listed)])
        fits = min((n for _, n, _ in listed), default=0) >= 0
        if wrong or not fits or values.shape != (ROWS, ends[-1]) or not (values[0] >= 0).all():
            received = f"{', '.join(wrong) or 'values'} of another kind, shape {values.shape}"
            raise storage.unreadable(path, received)
        sites: dict[str, Moments] = {}
        spread: dict[str, Spread] = {}
        for (site, _, has), start, end in zip(listed, ends, ends[1:], strict=False):
            sites[site], own = from_rows(values[:, start:end])
            if has:
                spread[site] = own
        return cls(sites=sites, spread=spread, **facts)

    def summary(self) -> str:
        """How many layers, over how much data."""
        return f"of {counted(len(self.sites), 'layer')} over {self._data()}"

    def _data(self) -> str:
        return f"{counted(self.samples, 'sample')} in {counted(self.batches, 'batch')}"

    def tables(self) -> Sequence[Table]:
        """One row per site."""
        errors = self.standard_errors()
        rows = tuple(
            (
                path,
                str(len(m.mean)),
                number(float(m.count.max(initial=0)), 9),
                number(float(np.abs(m.mean).max(initial=0))),
                number(float(m.standard_deviation.min(initial=math.inf))),
                number(float(m.standard_deviation.max(initial=0))),
                number(errors.get(path), 2),
            )
            for path, m in self.sites.items()
        )
        notes = (
            "Standard error: how far a mean or a standard deviation may be off because the data is "
            "a sample, in standard deviations (root mean square over the channels).",
        )
        if self.agreement is not None:
            notes += (
                "Seen again with these statistics in place, they differ by "
                f"{number(self.agreement, 2)} at most.",
            )
        return (
            Table(
                f"Population over {self._data()} "
                f"(upstream: {self.upstream}, passes: {self.passes})",
                (
                    "layer",
                    "channels",
                    "values per channel",
                    "largest |mean|",
                    "least std",
                    "largest std",
                    "standard error",
                ),
                rows,
                notes,
            ),
        )

    def drawing(self) -> Drawing:
        """What each layer's input is like: the extremes over its channels, as in the table."""
        moments = [*self.sites.values()]
        deviations = [m.standard_deviation for m in moments]
        return Rows(
            title=f"Inputs of {len(moments)} BatchNormalization over {self.samples} samples",
            alt=f"Dot chart of {len(moments)} layers: the largest mean of a channel, and the least "
            "and the largest standard deviation. The table has the numbers.",
            names=[*self.sites],
            unit="in the units of each layer's input",
            spans=[
                Span(
                    "largest |mean| of a channel",
                    "",
                    [float(np.abs(m.mean).max(initial=0)) for m in moments],
                    [None] * len(moments),
                    "orange",
                    "D",
                ),
                Span(
                    "least standard deviation of a channel",
                    "largest standard deviation",
                    [float(d.min(initial=math.inf)) for d in deviations],
                    [float(d.max(initial=0)) for d in deviations],
                    "blue",
                ),
            ],
        )


_FACTS = ("samples", "batches", "upstream", "passes", "agreement")
