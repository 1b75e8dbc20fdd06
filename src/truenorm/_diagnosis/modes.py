"""Rules about modes: TN401 to TN409. What ``inspect`` observed and explained, as findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Fault


def surprise(code: str, remedy: str) -> Callable[[Facts], Iterator[Fault]]:
    """The rule that finds one of the causes that ``inspect`` names."""

    def rule(facts: Facts) -> Iterator[Fault]:
        for one in facts.inspection.surprises:
            if one.code == code:
                yield Fault(one.path, {"cause": one.explanation}, remedy)

    return rule
