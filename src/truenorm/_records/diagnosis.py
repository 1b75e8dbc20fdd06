"""What is wrong with a model's BatchNormalization: findings, as of a linter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from truenorm._records.drawings.depth import Mark, Marks
from truenorm._records.drawings.drawing import Drawing, Drawn, Message
from truenorm._records.tables import Record, Table, counted, joined, number

Severity = Literal["note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
"""From the least: worth knowing; probably costs quality; cannot be meant."""

Evidence = Mapping[str, float | int | str]
WHICH = "which"
"""Evidence that names the channels that are meant, by their numbers from 0."""


@dataclass(frozen=True, repr=False)
class Finding(Record):
    """One problem, at one place.

    Args:
        code: Which rule: ``TN101``. ``docs/findings/`` has a page for each.
        severity: ``note``, ``warning`` or ``error``.
        problem: What is wrong, the same for all findings of the code.
        site: Path of the layer or call; the model's name where it is about the whole model.
        evidence: What was measured or read, by name; the code's page has the units and equations.
        remedy: A call that mends it.
    """

    code: str
    severity: Severity
    problem: str
    site: str
    evidence: Evidence
    remedy: str

    def summary(self) -> str:
        """Code, severity, site and problem."""
        return f"{self.code} {self.severity} at '{self.site}': {self.problem}"

    def tables(self) -> Sequence[Table]:
        """One row."""
        return (_table(f"{self.code}: {self.problem}", (self,)),)


@dataclass(frozen=True)
class Skipped:
    """What could not be looked at, and why.

    Args:
        codes: Of rules that could not run; or ``("the loss",)``, by which no rule could then judge.
        reason: Why not.
    """

    codes: tuple[str, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class Diagnosis(Record, Drawn):
    """Everything that was found in a model, and what could not be looked for.

    Args:
        model: The model's name.
        findings: The findings, in the order of their codes, then of the model.
        checked: Codes of the rules that ran.
        skipped: Codes of the rules that could not run, by reason.
        sites: Paths of the model's BatchNormalization, in their order.
        compared: On how many batches training and inference were compared, and of how many; None
            if on all, or if no rule asked for it.
    """

    model: str
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    sites: tuple[str, ...] = ()
    compared: tuple[int, ...] | None = None

    @property
    def worst(self) -> Severity | None:
        """The highest severity found; None if nothing was."""
        found = [SEVERITIES.index(finding.severity) for finding in self.findings]
        return SEVERITIES[max(found)] if found else None

    @property
    def clean(self) -> bool:
        """Whether there is nothing above a note."""
        return self.worst in (None, "note")

    def summary(self) -> str:
        """How many findings of each severity, the gravest first."""
        counts = [
            counted(n, severity)
            for severity in reversed(SEVERITIES)
            if (n := sum(f.severity == severity for f in self.findings))
        ]
        found = ", ".join(counts) or "nothing found"
        return f"of '{self.model}': {found} ({counted(len(self.checked), 'rule')})"

    def tables(self) -> Sequence[Table]:
        """One row per code, the gravest first; sites and evidence put together; remedies below."""
        title = f"Diagnosis {self.summary()}"
        notes = [f"Not checked: {', '.join(s.codes)}: {s.reason}." for s in self.skipped]
        if self.compared is not None:
            some = " of ".join(map(str, self.compared))
            notes.append(f"Training and inference compared on {some} batches.")
        return (_table(title, self.findings, tuple(notes)),)

    def drawing(self) -> Drawing:
        """The findings along the depth of the model, a row per code, the gravest on top."""
        title = f"Diagnosis {self.summary()}"
        if not self.findings:
            return Message(title=title, alt="Nothing was found.", text="Nothing was found.")
        places = self.sites or tuple(dict.fromkeys(f.site for f in self.findings))
        graves = sorted(self.findings, key=lambda f: -SEVERITIES.index(f.severity))
        codes = {finding.code: finding.problem for finding in graves}
        sites = {code: [f.site for f in graves if f.code == code] for code in codes}
        drawn = [f for f in graves if f.site in (*places, self.model)]
        others = {
            code: [site for site in sites[code] if site not in (*places, self.model)]
            for code in codes
        }
        return Marks(
            title=title,
            alt=". ".join(f"{code}, {codes[code]}: {joined(sites[code])}" for code in codes),
            notes=("A finding about the whole model is a line along all of it.",)
            if any(f.site not in places for f in drawn)
            else (),
            places=places,
            rows={
                code: ": ".join(filter(None, (words, joined(others[code]))))
                for code, words in codes.items()
            },
            marks=[Mark(f.code, f.site, f.severity) for f in drawn],
        )


_NAMED = 2
"""Sites that a row names."""


def _table(title: str, findings: Sequence[Finding], notes: tuple[str, ...] = ()) -> Table:
    """Findings of one code with the same words as evidence share a row, and codes a remedy."""
    alike: dict[tuple[object, ...], list[Finding]] = {}
    graves = sorted(findings, key=lambda f: -SEVERITIES.index(f.severity))
    for finding in graves:
        words = tuple(v for k, v in finding.evidence.items() if isinstance(v, str) and k != WHICH)
        alike.setdefault((finding.code, tuple(finding.evidence), words), []).append(finding)
    rows = tuple(
        (
            f"{group[0].code} {group[0].severity}",
            group[0].problem,
            joined([f.site for f in group], most=_NAMED),
            _measured([f.evidence for f in group]),
        )
        for group in alike.values()
    )
    columns = ("code", "problem", "site", "evidence") if rows else ()
    severities = tuple(group[0].severity for group in alike.values())
    return Table(title, columns, rows, (*_mending(graves), *notes), severities)


def _mending(findings: Iterable[Finding]) -> Iterator[str]:
    """A line per remedy; remedies that differ in their site only are told by the first of them."""
    alike: dict[str, list[Finding]] = {}
    for finding in findings:
        path = re.escape(finding.site.partition("#")[0])
        kind = re.sub(rf"(?<=['\" ]){path}(?=['\" ]|$)", "…", finding.remedy)
        alike.setdefault(kind, []).append(finding)
    for group in alike.values():
        codes = ", ".join(dict.fromkeys(finding.code for finding in group))
        sites = len({finding.remedy for finding in group})
        others = f", and so for each of the {sites} sites" if sites > 1 else ""
        yield f"Remedy of {codes}: {group[0].remedy}{others}"


def _measured(evidence: Sequence[Evidence]) -> str:
    """Each name with its value; with its range, where several sites share the row."""
    parts: list[str] = []
    for name, first in evidence[0].items():
        said = name.replace("_", " ")
        if name == WHICH:
            each = [str(one[name]) for one in evidence]
            some = each if len(each) <= _NAMED else [*each[: _NAMED - 1], "…", each[-1]]
            parts.append(f"{said} {'; '.join(some)}")
            continue
        if isinstance(first, str):
            parts.append(f"{said} {first}")
            continue
        values = sorted((one[name] for one in evidence), key=float)
        ends = (str(v) if isinstance(v, int) else number(float(v)) for v in (values[0], values[-1]))
        parts.append(f"{said} {'…'.join(dict.fromkeys(ends))}")
    return ", ".join(parts)
