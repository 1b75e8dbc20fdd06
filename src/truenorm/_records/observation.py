"""What the BatchNormalization layers of a model did, call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from truenorm._records.tables import Record, Table, counted, grouped

Statistics = Literal["batch", "moving", "neither", "unknown"]
"""Which statistics normalised: ``neither`` and ``unknown`` are of custom subclasses only."""


@dataclass(frozen=True)
class Calls:
    """Calls of one site that were alike.

    Args:
        training: The value of ``training`` that arrived in ``call``; ``"a tensor"`` if it was one.
        trainable: The layer's ``trainable`` at that time.
        policy: Its freeze policy at that time.
        statistics: Which statistics normalised: ``batch`` (the batch's own) or ``moving``. Of a
            custom subclass with a ``call`` of its own also ``neither``, where its output is neither
            of the two normalisations, and ``unknown``, where it cannot be told.
        times: How many such calls there were.
    """

    training: bool | str | None
    trainable: bool
    policy: str
    statistics: Statistics
    times: int

    def describe(self) -> str:
        """The calls in a few words, for a table cell."""
        frozen = "" if self.policy == "none" else f", frozen: {self.policy}"
        return f"{self.times}× training={self.training}{frozen}: {self.statistics}"


@dataclass(frozen=True, repr=False)
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
        """As in :class:`Calls`; ``mixed`` if not always the same; None if it was never called."""
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

    def summary(self) -> str:
        """As :meth:`describe`."""
        return self.describe()

    def tables(self) -> Sequence[Table]:
        """One row."""
        return (Table("mode", ("mode",), ((self.describe(),),)),)


@dataclass(frozen=True, repr=False)
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

    def summary(self) -> str:
        """How many sites."""
        return f"of '{self.model}': {counted(len(self.modes), 'site')}"

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
        return (Table(title, columns, grouped(rows), self.notes),)
