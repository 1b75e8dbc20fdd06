"""Where the BatchNormalization layers of a model are, and what they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from truenorm._tables import Record, Table


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
