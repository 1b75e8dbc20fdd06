"""What the tools return: frozen dataclasses of plain facts. They know nothing of Keras."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from truenorm._errors import DataError
from truenorm._moments import Moments
from truenorm._tables import NOT_DATA, Record, Table, number

# --- sites and modes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Site(Record):
    """One place where a BatchNormalization is called in a model.

    Args:
        path: Where it is: layer names joined by ``/``; ``#2`` is the second call of a shared layer.
        layer: The class of the layer, with its package: ``keras.BatchNormalization``.
        producer: What makes its input, as ``Class name``.
        consumers: What takes its output, each as ``Class name``.
        position: ``before_activation``, ``after_activation``, ``before_layer``, or None where it
            is none of these (before an Add, a pooling, the output).
        axis: The axis of the channels, as an index from the left.
        channels: Number of channels.
        momentum: Weight of the old moving statistics.
        epsilon: Added to the variance before the root is taken.
        trainable: The layer's own ``trainable``, as it is in effect.
    """

    path: str
    layer: str
    producer: str
    consumers: tuple[str, ...]
    position: str | None
    axis: int
    channels: int
    momentum: float
    epsilon: float
    trainable: bool

    def tables(self) -> Sequence[Table]:
        """One row."""
        return (
            Table(
                self.path, ("fact", "value"), tuple((k, str(v)) for k, v in self.to_dict().items())
            ),
        )


@dataclass(frozen=True)
class Mode(Record):
    """What one site really did in one entry point, as observed.

    Args:
        calls: How often the layer's ``call`` was traced or run.
        training: The values of ``training`` that arrived in ``call``.
        statistics: Which statistics normalised: ``batch``, ``moving``, ``mixed``, or None if it
            was never called.
        updated: Whether the moving statistics changed.
        learned: Whether gamma or beta changed.
    """

    calls: int
    training: tuple[bool | None, ...]
    statistics: str | None
    updated: bool
    learned: bool

    def describe(self) -> str:
        """The mode in a few words, for a table cell."""
        if self.statistics is None:
            return "not called"
        extras = [word for word, on in (("updates", self.updated), ("learns", self.learned)) if on]
        return " + ".join([self.statistics, *extras])

    def tables(self) -> Sequence[Table]:
        """One row."""
        return (Table("mode", ("mode",), ((self.describe(),),)),)


@dataclass(frozen=True)
class Left:
    """A site that a tool left as it was, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Inspection(Record):
    """Every site of a model, and what it did in each entry point.

    Args:
        model: The model's name.
        sites: The sites, in the order of their calls.
        modes: For each entry point, the mode of each site (same order as ``sites``).
        hidden: Layers that were not looked at, and why.
    """

    model: str
    sites: tuple[Site, ...]
    modes: Mapping[str, tuple[Mode, ...]]
    hidden: tuple[Left, ...] = ()

    def tables(self) -> Sequence[Table]:
        """Where every site is, and what every site did."""
        place = Table(
            f"BatchNormalization in '{self.model}': where it is",
            ("site", "position", "input from", "output to", "channels", "trainable"),
            tuple(
                (
                    s.path,
                    s.position or "–",
                    _class(s.producer),
                    ", ".join(map(_class, s.consumers)) or "output",
                    str(s.channels),
                    "yes" if s.trainable else "no",
                )
                for s in self.sites
            ),
        )
        alike: dict[tuple[str, ...], list[str]] = {}
        for index, site in enumerate(self.sites):
            row = tuple(modes[index].describe() for modes in self.modes.values())
            alike.setdefault(row, []).append(site.path)
        mode = Table(
            f"BatchNormalization in '{self.model}': the statistics it normalised with, and more",
            ("sites", *self.modes),
            tuple((_together(paths), *row) for row, paths in alike.items()),
            (
                "batch: normalised with the batch's own mean and variance; moving: with the "
                "moving statistics; updates: the moving statistics changed; learns: gamma and "
                "beta changed.",
                *(f"Not looked at: {one.path}, {one.reason}." for one in self.hidden),
            ),
        )
        return (place, mode)


def _class(label: str) -> str:
    return label.split(" ", 1)[0]


def _together(paths: Sequence[str], most: int = 3) -> str:
    """Sites that did the same, on one line."""
    if len(paths) <= most:
        return ", ".join(paths)
    return f"{len(paths)} sites: {', '.join(paths[: most - 1])}, … {paths[-1]}"


# --- rewrites ----------------------------------------------------------------------------------


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
        notes: What the user must know about the new model.
    """

    model: Any = field(repr=False, compare=False, metadata=NOT_DATA)
    kind: str
    changed: tuple[Change, ...]
    left: tuple[Left, ...]
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    notes: tuple[str, ...] = ()

    def tables(self) -> Sequence[Table]:
        """The receipt."""
        total = len(self.changed) + len(self.left)
        notes = list(self.notes)
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


# --- statistics --------------------------------------------------------------------------------


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


# --- studies -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial(Record):
    """One training run: one position, one seed.

    Args:
        position: Where BatchNormalization was.
        seed: Decides initial weights and the order of the batches.
        history: Keras's history: per metric its value after each epoch (``val_`` for validation),
            with the moving statistics as training left them.
        final: The validation metrics that the study judges by, under the same names: after the
            last epoch, with recalibrated statistics unless the study was told otherwise.
        sites: How many BatchNormalization sites the model had.
        parameters: Number of the model's parameters.
        seconds: Time of the run, in seconds, with start and compilation.
        model: File of the trained model, relative to the study's folder.
        error: None, or why the run failed (then the history is empty).
    """

    position: str
    seed: int
    history: Mapping[str, tuple[float, ...]]
    final: Mapping[str, float]
    sites: int
    parameters: int
    seconds: float
    model: str
    error: str | None = None

    def tables(self) -> Sequence[Table]:
        """The metrics that the study judges by."""
        rows = tuple((name, number(value, 4)) for name, value in self.final.items())
        return (Table(f"{self.position}, seed {self.seed}", ("metric", "value"), rows),)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% confidence interval (Student's t; low and high None if n=1).

    Args:
        mean: The mean, in the metric's units.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two positions compared over the same seeds: the paired difference ``first - second``.

    Args:
        metric: Which metric, as in Keras's history.
        first: A position.
        second: Another position.
        difference: Mean and interval of the paired difference, in the metric's units.
        p_value: Of the paired t-test, two-sided.
        p_adjusted: The same after Holm's correction for all pairs of positions of this metric.
    """

    metric: str
    first: str
    second: str
    difference: Interval
    p_value: float | None
    p_adjusted: float | None


@dataclass(frozen=True)
class Study(Record):
    """A controlled experiment over positions and seeds, and what it shows.

    Args:
        name: What was studied.
        settings: All that decides the result: epochs, batch size, seeds, backend, versions.
        trials: Every run.
        summaries: Per position, per metric, mean and interval over the seeds.
        comparisons: Every pair of positions, per metric.
        metric: The metric that decides.
        best: The position whose mean of that metric is best, shown or not.
        winner: That position if it is shown to differ from each other one, else None.
        verdict: The result in sentences.
    """

    name: str
    settings: Mapping[str, Any]
    trials: tuple[Trial, ...]
    summaries: Mapping[str, Mapping[str, Interval]]
    comparisons: tuple[Comparison, ...]
    metric: str
    best: str
    winner: str | None
    verdict: tuple[str, ...]

    def tables(self) -> Sequence[Table]:
        """The positions, their paired differences, and the verdict."""
        metrics = tuple(dict.fromkeys(name for row in self.summaries.values() for name in row))
        positions = Table(
            f"{self.name}: mean over seeds [95% interval]",
            ("position", "seeds", *metrics),
            tuple(
                (
                    position,
                    str(max(i.n for i in row.values())),
                    *(interval(row[m]) for m in metrics),
                )
                for position, row in self.summaries.items()
            ),
        )
        pairs = Table(
            f"{self.name}: paired differences, same seeds [95% interval]",
            ("metric", "difference", "mean", "p", "p (Holm)"),
            tuple(
                (
                    c.metric,
                    f"{c.first} − {c.second}",
                    interval(c.difference),
                    number(c.p_value, 2),
                    number(c.p_adjusted, 2),
                )
                for c in self.comparisons
            ),
        )
        return (positions, pairs, Table("Verdict", (), (), self.verdict))


def interval(value: Interval) -> str:
    """An interval for a table cell."""
    if value.low is None or value.high is None:
        return f"{value.mean:.4f}"
    return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"
