"""Where the BatchNormalization layers of a model are, and what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from truenorm._tables import NOT_DATA, Record, Table


@dataclass(frozen=True)
class Site(Record):
    """One place where a BatchNormalization is called in a model.

    Args:
        path: Where it is: layer names joined by ``/``; ``#2`` is the second call of a shared layer.
        layer: The class of the layer, with its package: ``keras.BatchNormalization``.
        producer: What makes its input, as ``Class name``; None where no graph shows it.
        consumers: What takes its output, each as ``Class name``.
        position: ``before_activation``, ``after_activation``, ``before_layer``, or None where it
            is none of these (before an Add, a pooling, the output) or not known.
        axis: The axis of the channels, as an index from the left.
        channels: Number of channels.
        momentum: Weight of the old moving statistics.
        epsilon: Added to the variance before the root is taken.
        trainable: The layer's own ``trainable``, as it is in effect.
        policy: The freeze policy in effect: ``none``, ``all``, ``statistics`` or ``affine``.
    """

    path: str
    layer: str
    producer: str | None
    consumers: tuple[str, ...]
    position: str | None
    axis: int
    channels: int
    momentum: float | None
    epsilon: float
    trainable: bool
    policy: str

    def tables(self) -> Sequence[Table]:
        """One row per fact."""
        return (
            Table(
                self.path, ("fact", "value"), tuple((k, str(v)) for k, v in self.to_dict().items())
            ),
        )


@dataclass(frozen=True)
class Calls:
    """Calls of one site that were alike.

    Args:
        training: The value of ``training`` that arrived in ``call``; ``"a tensor"`` if it was one.
        trainable: The layer's ``trainable`` at that time.
        policy: Its freeze policy at that time.
        statistics: Which statistics normalised: ``batch`` or ``moving``.
        times: How many such calls there were.
    """

    training: bool | str | None
    trainable: bool
    policy: str
    statistics: str
    times: int

    def describe(self) -> str:
        """The calls in a few words, for a table cell."""
        frozen = "" if self.policy == "none" else f", frozen: {self.policy}"
        return f"{self.times}× training={self.training}{frozen}: {self.statistics}"


@dataclass(frozen=True)
class Mode(Record):
    """What one site really did over a time, as observed.

    Args:
        calls: Its calls, alike ones together, in the order of their first.
        updated: Whether the layer's moving statistics changed.
        learned: Whether the layer's gamma or beta changed.
    """

    calls: tuple[Calls, ...]
    updated: bool
    learned: bool

    @property
    def statistics(self) -> str | None:
        """Which normalised: ``batch``, ``moving``, ``mixed``; None if it was never called."""
        used = {calls.statistics for calls in self.calls}
        return ("mixed" if len(used) > 1 else used.pop()) if used else None

    @property
    def training(self) -> tuple[bool | str | None, ...]:
        """The different values of ``training`` that arrived."""
        return tuple(dict.fromkeys(calls.training for calls in self.calls))

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
class Observation(Record):
    """What every site did while an observation was open; empty until it is closed.

    Args:
        model: The model's name.
        modes: Per path of a site, what it did.
        notes: What must be known to read them.
    """

    model: str
    modes: Mapping[str, Mode]
    notes: tuple[str, ...] = ()

    def tables(self) -> Sequence[Table]:
        """One row per group of sites that did the same."""
        rows = (
            (
                path,
                (
                    "; ".join(calls.describe() for calls in mode.calls) or "not called",
                    "changed" if mode.updated else "–",
                    "changed" if mode.learned else "–",
                ),
            )
            for path, mode in self.modes.items()
        )
        columns = ("sites", "calls: statistics used", "moving statistics", "gamma, beta")
        title = f"BatchNormalization in '{self.model}': what it did"
        return (Table(title, columns, _grouped(rows), self.notes),)


@dataclass(frozen=True)
class Surprise:
    """Why a site did, or would do, other than its entry point leads one to expect.

    Args:
        path: The site.
        code: Which reason, as a word for programs.
        explanation: The reason in a sentence.
    """

    path: str
    code: str
    explanation: str


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
        surprises: What is not as one would expect of the entry points, with the cause.
    """

    model: str
    sites: tuple[Site, ...]
    modes: Mapping[str, tuple[Mode, ...]]
    surprises: tuple[Surprise, ...] = ()

    def tables(self) -> Sequence[Table]:
        """Where every site is, what every site did, and why where that surprises."""
        place = Table(
            f"BatchNormalization in '{self.model}': where it is",
            ("sites", "channels", "position", "from → to", "momentum, epsilon", "frozen"),
            _places(self.sites),
        )
        done = (
            (site.path, tuple(modes[index].describe() for modes in self.modes.values()))
            for index, site in enumerate(self.sites)
        )
        mode = Table(
            f"BatchNormalization in '{self.model}': the statistics it normalised with, and more",
            ("sites", *self.modes),
            _grouped(done),
            (
                "batch: normalised with the batch's own mean and variance; moving: with the "
                "moving statistics; updates: the moving statistics changed; learns: gamma and "
                "beta changed.",
            ),
        )
        if not self.surprises:
            return (place, mode)
        why = Table(
            f"BatchNormalization in '{self.model}': why it did not do what one might expect",
            ("sites", "code", "cause"),
            _grouped((s.path, (s.code, s.explanation)) for s in self.surprises),
        )
        return (place, mode, why)


def _places(sites: Sequence[Site]) -> tuple[tuple[str, ...], ...]:
    """One row per group of sites that are in the same kind of place."""
    alike: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        after = ", ".join(dict.fromkeys(map(_class, site.consumers))) or "output"
        row = (
            site.position or "–",
            "–" if site.producer is None else f"{_class(site.producer)} → {after}",
            f"{site.momentum}, {site.epsilon:g}",
            "no" if site.policy == "none" else site.policy,
        )
        alike.setdefault(row, []).append(site)
    return tuple(
        (_together([s.path for s in group]), _range([s.channels for s in group]), *row)
        for row, group in alike.items()
    )


def _grouped(rows: Iterable[tuple[str, tuple[str, ...]]]) -> tuple[tuple[str, ...], ...]:
    """Sites with the same cells, on one line."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for path, row in rows:
        alike.setdefault(row, []).append(path)
    return tuple((_together(paths), *row) for row, paths in alike.items())


def _class(label: str) -> str:
    return label.split(" ", 1)[0]


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def _together(paths: Sequence[str], most: int = 3) -> str:
    """Sites that did the same, on one line."""
    if len(paths) <= most:
        return ", ".join(paths)
    return f"{len(paths)} sites: {', '.join(paths[: most - 1])}, … {paths[-1]}"


# --- freezing ----------------------------------------------------------------------------------


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


@dataclass(frozen=True)
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

    def tables(self) -> Sequence[Table]:
        """One row per group of layers with the same change."""
        rows = _grouped((one.path, (one.before, one.after)) for one in self.layers)
        title = f"Freeze policy of {len(self.layers)} layers"
        return (Table(title, ("layers", "was", "is"), rows, self.notes),)
