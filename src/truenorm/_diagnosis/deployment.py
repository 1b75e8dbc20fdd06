"""Rules about what inference costs: TN501."""

from __future__ import annotations

from collections.abc import Iterator

from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Fault
from truenorm._folding import why_not_folded


def not_foldable(facts: Facts) -> Iterator[Fault]:
    """TN501."""
    for site in facts.sites:
        reason = why_not_folded(site)
        if reason is not None:
            yield Fault(site.path, {"reason": reason}, 'tn.place(model, "before_activation")')
