"""What a rule of :func:`truenorm.diagnose` is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from truenorm._diagnosis.facts import Facts, Need
from truenorm._records.diagnosis import WHICH, Evidence, Severity


class Fault(NamedTuple):
    """What a rule found at one place; with the rule's code and severity it is a Finding."""

    site: str
    evidence: Evidence
    remedy: str


MOST = 6
"""Channels that a finding names by their numbers."""


def named(which: NDArray[np.bool_]) -> Evidence:
    """Of how many channels some have a fault, and which: numbers from 0."""
    numbers = [*map(str, np.flatnonzero(which))]
    more = f" and {len(numbers) - MOST} more" if len(numbers) > MOST else ""
    return {"channels": which.size, WHICH: ", ".join(numbers[:MOST]) + more}


@dataclass(frozen=True)
class Rule:
    """One line of the table of rules.

    Args:
        code: ``TN`` and three digits; the first is the group.
        severity: Of everything that the rule finds.
        problem: What it finds, in a few words.
        check: Yields what it finds.
        needs: Facts that not every model or call of ``diagnose`` has.
    """

    code: str
    severity: Severity
    problem: str
    check: Callable[[Facts], Iterator[Fault]]
    needs: tuple[Need, ...] = ()
