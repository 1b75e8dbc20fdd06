"""Rules about what inference costs: TN501."""

from __future__ import annotations

from collections.abc import Iterator

from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Fault
from truenorm._model.sites import position
from truenorm._rewrites.fold import why_not_folded

BEFORE = 'model = tn.place(model, "before_activation").model, trained anew'


def not_foldable(facts: Facts) -> Iterator[Fault]:
    """TN501."""
    reasons = why_not_folded(facts.model)
    for site in facts.sites:
        reason = reasons.get(site.path)
        if reason is not None:
            for call in (*site.producers, *site.consumers):
                if call is not None:  # a class is enough here: many sites share the reason then
                    reason = reason.replace(call.label(), type(call.operation).__name__)
            behind = position(site) == "after_activation"
            remedy = BEFORE if behind else "none for it; tn.fold(model) folds the others"
            yield Fault(site.path, {"reason": reason}, remedy)
