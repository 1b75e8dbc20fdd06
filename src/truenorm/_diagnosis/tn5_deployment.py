"""Rules about what inference costs: TN501."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial

from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Fault
from truenorm._model.graph import Call, graph_of
from truenorm._model.sites import position
from truenorm._rewrites.fold import why_not_folded
from truenorm._rewrites.place import can_be_placed

BEFORE = 'model = tn.place(model, "before_activation").model, trained anew'
NONE = "none for it"
OTHERS = f"{NONE}; tn.fold(model) folds the others"


def not_foldable(facts: Facts) -> Iterator[Fault]:
    """TN501."""
    reasons = why_not_folded(facts.model)
    none = NONE if {*facts.layers.values()} <= {*reasons} else OTHERS
    folded_alone = cache(partial(_folded_alone, facts))
    for site in facts.sites:
        reason = reasons.get(site.path)
        if reason is not None:
            for call in (*site.producers, *site.consumers):
                if call is not None:  # a class is enough here: many sites share the reason then
                    reason = reason.replace(call.label(), type(call.operation).__name__)
            remedy = none
            if site.shared:
                remedy = folded_alone(site.path.partition("/")[0]).get(_within(site), none)
            elif position(site) == "after_activation" and can_be_placed(site, "before_activation"):
                remedy = BEFORE
            yield Fault(site.path, {"reason": reason}, remedy)


def _within(site: Call) -> str:
    """The path in the outermost nested model, of the layer and not of one of its calls."""
    return site.path.partition("#")[0].partition("/")[2]


def _folded_alone(facts: Facts, name: str) -> Mapping[str, str]:
    """What folds a layer of a nested model that is called more than once: the model by itself."""
    part = next((layer for layer in facts.model.layers if layer.name == name), None)
    if part is None or graph_of(part) is None:
        return {}
    remedy = f"tn.fold(model.get_layer({name!r})).model, and the model built with it"
    left = why_not_folded(part)
    paths = {_within(site) for site in facts.sites if site.path.startswith(f"{name}/")}
    return {path: remedy for path in paths if path not in left}
