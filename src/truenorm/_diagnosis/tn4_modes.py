"""Rules about modes: TN401 to TN409. What ``inspect`` observed and explained, as findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from truenorm._diagnosis import remedies
from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Fault
from truenorm._model.sites import policy_of

Remedy = str | Callable[[Facts, str], str]
"""The remedy itself, or what makes it for a layer's path."""


def surprise(code: str, remedy: Remedy) -> Callable[[Facts], Iterator[Fault]]:
    """The rule that finds one of the causes that ``inspect`` names."""

    def rule(facts: Facts) -> Iterator[Fault]:
        for one in facts.inspection.surprises:
            if one.code == code:
                path = one.path.partition("#")[0]
                what = remedy if isinstance(remedy, str) else remedy(facts, path)
                yield Fault(one.path, {"cause": one.explanation}, what)

    return rule


def unfreeze(facts: Facts, path: str) -> str:  # noqa: ARG001
    """This layer alone: others may be frozen on purpose."""
    return f"tn.unfreeze(model, layers={path!r})"


def thaw_parent(facts: Facts, path: str) -> str:
    """The outermost frozen layer around it: inside of one, gamma and beta would not learn."""
    layer = next(k for k, own in facts.layers.items() if own == path)
    parent = next((one for one in facts.parents[layer] if not one.trainable), facts.model)
    within = "" if parent is facts.model else f".get_layer({parent.name!r})"
    return f"model{within}.trainable = True, and model.compile(…) after it"


def hold(facts: Facts, path: str) -> str:
    """What holds the statistics on every version of Keras."""
    layer = next(k for k, own in facts.layers.items() if own == path)
    if policy_of(layer) == "statistics":
        return "layer(x) without training=: its freeze policy holds them"
    return remedies.hold(facts, layer)
