"""Every BatchNormalization of a model: where it is, what it does in each entry point, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from truenorm._records.drawings.depth import Kind, Strips
from truenorm._records.drawings.drawing import Drawing, Drawn
from truenorm._records.observation import Mode
from truenorm._records.site import Site
from truenorm._records.tables import Record, Table, counted, grouped, joined

ENTRY_POINTS = ("fit", "evaluate", "predict", "model(x)", "model(x, training=True)")
"""What ``inspect`` runs."""


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


@dataclass(frozen=True, repr=False)
class Inspection(Record, Drawn):
    """Every site of a model, and what it did in each entry point.

    Args:
        model: The model's name.
        sites: The sites, in the order of their calls.
        modes: For each entry point that could be run, the mode of each site (same order as
            ``sites``).
        surprises: What is not as one would expect of the entry points, with the cause.
        not_run: For each entry point that could not be run, the reason.
    """

    model: str
    sites: tuple[Site, ...]
    modes: Mapping[str, tuple[Mode, ...]]
    surprises: tuple[Surprise, ...] = ()
    not_run: Mapping[str, str] = field(default_factory=dict[str, str])

    def summary(self) -> str:
        """How many sites, and how many of them surprise."""
        surprises = counted(len(self.surprises), "surprise") if self.surprises else "as expected"
        return f"of '{self.model}': {counted(len(self.sites), 'site')}, {surprises}"

    def tables(self) -> Sequence[Table]:
        """Where every site is, what every site did, and why where that surprises."""
        inside = ("inside",) if any(site.inside() for site in self.sites) else ()
        place = Table(
            f"BatchNormalization in '{self.model}': where it is",
            ("sites", "channels", "position", *inside, *_OF_PLACES),
            _places(self.sites, inside=bool(inside)),
        )
        entries = [entry for entry in ENTRY_POINTS if {entry} & {*self.modes, *self.not_run}]
        done = (
            (
                site.path,
                tuple(
                    self.modes[entry][index].describe() if entry in self.modes else "not run"
                    for entry in entries
                ),
            )
            for index, site in enumerate(self.sites)
        )
        mode = Table(
            f"BatchNormalization in '{self.model}': the statistics it normalised with, and more",
            ("sites", *entries),
            grouped(done),
            (_LEGEND, *(f"{entry} was not run: {why}" for entry, why in self.not_run.items())),
        )
        if not self.surprises:
            return (place, mode)
        why = Table(
            f"BatchNormalization in '{self.model}': why it did not do what one might expect",
            ("sites", "code", "cause"),
            grouped((s.path, (s.code, s.explanation)) for s in self.surprises),
        )
        return (place, mode, why)

    def drawing(self) -> Drawing:
        """A strip of the model per entry point, its sites coloured by what they did in it."""
        ran = {entry: self.modes[entry] for entry in ENTRY_POINTS if entry in self.modes}
        words = [f"{entry}: {_in_words(self.sites, modes)}" for entry, modes in ran.items()]
        return Strips(
            title=f"BatchNormalization in '{self.model}': the statistics it normalised with",
            alt=". ".join(words) or "No entry point could be run",
            notes=(
                _LEGEND,
                *(f"{entry} was not run: {why}" for entry, why in self.not_run.items()),
            ),
            places=[site.path for site in self.sites],
            strips={entry: [_kind(mode) for mode in modes] for entry, modes in ran.items()},
        )


_COLOURS = {"batch": "orange", "moving": "blue", "mixed": "purple", None: "grid"}


def _kind(mode: Mode) -> Kind:
    """A colour for the statistics, the stronger the more changed."""
    strength = {(True, True): 1.0, (True, False): 0.7, (False, True): 0.55, (False, False): 0.4}
    return Kind(
        mode.describe(),
        _COLOURS.get(mode.statistics, "olive"),
        strength[mode.updated, mode.learned] if mode.statistics else 1.0,
    )


def _in_words(sites: Sequence[Site], modes: Sequence[Mode]) -> str:
    found: dict[str, list[str]] = {}
    for site, mode in zip(sites, modes, strict=True):
        found.setdefault(mode.describe(), []).append(site.path)
    return "; ".join(f"{joined(paths)} {did}" for did, paths in found.items())


_LEGEND = (
    "batch: normalised with the batch's own mean and variance; moving: with the moving statistics; "
    "updates: the moving statistics changed; learns: gamma and beta changed."
)


_OF_PLACES = ("from → to", "momentum, epsilon", "frozen")


def _places(sites: Sequence[Site], *, inside: bool) -> tuple[tuple[str, ...], ...]:
    """One row per group of sites that are in the same kind of place."""
    alike: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        after = ", ".join(dict.fromkeys(map(_class, site.consumers))) or "output"
        row = (
            site.position or "–",
            *([site.inside() or "–"] if inside else []),
            "–" if site.producer is None else f"{_class(site.producer)} → {after}",
            f"{site.momentum}, {site.epsilon:g}",
            "no" if site.policy == "none" else site.policy,
        )
        alike.setdefault(row, []).append(site)
    return tuple(
        (joined([s.path for s in group]), _range([s.channels for s in group]), *row)
        for row, group in alike.items()
    )


def _class(label: str) -> str:
    return label.split(" ", 1)[0]


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"
