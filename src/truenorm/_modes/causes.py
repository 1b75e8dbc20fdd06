"""Why a BatchNormalization did other than its entry point leads one to expect."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras

from truenorm._keras_internals import layers_in
from truenorm._model.graph import calls, graph_of, parents_in
from truenorm._model.sites import Spot, policy_of
from truenorm._model.trainer import changed_after_compile, fit_after_change
from truenorm._modes.which_statistics import has_own_call
from truenorm._records.inspection import ENTRY_POINTS, Surprise
from truenorm._records.observation import Mode

INFERENCE = ("evaluate", "predict", "model(x)")


IF_CHANGED = (
    "If the change is meant for this model, make it with truenorm's freeze or unfreeze. If it is "
    "meant only for a model that contains this one (a GAN's, which freezes the discriminator), set "
    "trainable back before each step of this model, and do not compile it again"
)
"""What to do about a ``trainable`` that was changed after ``compile``."""


@dataclass(frozen=True)
class _Whole:
    """The model around all sites, and what is found out of it once for all of them."""

    model: Any

    @cached_property
    def parents(self) -> Mapping[Any, Sequence[Any]]:
        """What each layer is inside of, from the outermost."""
        return parents_in(self.model)

    @cached_property
    def changed(self) -> Mapping[Any, bool]:
        """The layers whose ``trainable`` was changed after ``compile``, and what it was."""
        return changed_after_compile(self.model)

    @cached_property
    def first_in_training_mode(self) -> Any | None:
        """The first layer that runs in training mode where nobody asks for it."""
        return next(_in_training_mode_by_itself(self.model), None)


@dataclass(frozen=True)
class _Case:
    """One site, and what it did in each entry point."""

    whole: _Whole
    spot: Spot
    modes: Mapping[str, Mode]

    @property
    def written(self) -> tuple[str, bool] | None:
        return None if self.spot.call is None else self.spot.call.written

    @property
    def frozen_parent(self) -> Any | None:
        parents = self.whole.parents[self.spot.layer]
        return next((one for one in reversed(parents) if not one.trainable), None)


def surprises(
    model: Any, places: Sequence[Spot], modes: Mapping[str, Sequence[Mode]]
) -> tuple[Surprise, ...]:
    """The causes, site by site; ``model`` is the user's, whose sites were watched in ``modes``."""
    found: list[Surprise] = []
    whole = _Whole(model)
    for index, spot in enumerate(places):
        did = dict.fromkeys(ENTRY_POINTS, Mode((), updated=False, learned=False))
        did |= {entry: of_sites[index] for entry, of_sites in modes.items()}
        case = _Case(whole, spot, did)
        own = [*_own_call(case)]
        others = [] if own else [*_written(case), *_inference(case)]
        for code, explanation in (*_learning(case), *own, *others):
            found.append(Surprise(spot.path, code, explanation))
    return tuple(found)


def _learning(case: _Case) -> Iterator[tuple[str, str]]:
    """Where fit did not use the batch, did not move the statistics, or did not learn."""
    layer, parent, fit = case.spot.layer, case.frozen_parent, case.modes["fit"]
    policy = policy_of(layer)
    changed, model = case.whole.changed, case.whole.model
    if layer in changed:
        yield (
            "changed_after_compile",
            f"trainable is {layer.trainable}, and was {changed[layer]} when the model was "
            f"compiled: fit {fit_after_change(model)}. {IF_CHANGED}",
        )
    if policy in ("statistics", "affine"):
        kept = "the moving statistics" if policy == "statistics" else "gamma and beta"
        yield "policy", f"its freeze policy is '{policy}': {kept} stay as they are"
    elif policy == "all" and parent is not None:
        yield (
            "frozen_parent",
            f"'{parent.name}', which it is in, is frozen (trainable=False), and with it all inside",
        )
    elif policy == "all":
        so = "" if fit.statistics == "batch" else ": so it also runs in inference mode"
        yield "frozen", f"it is frozen (trainable=False){so}"
    elif parent is not None:
        yield (
            "parent_frozen_child_updates",
            f"'{parent.name}' is frozen, but this layer inside was made trainable again: its "
            f"statistics {'move' if fit.updated else 'would move'}, gamma and beta are not learned",
        )
    elif fit.calls and True not in fit.training and False not in fit.training:
        yield (
            "call_without_training",
            f"no training value reaches it in fit: call() of {type(model).__name__} takes no "
            "argument 'training', or a layer on the way does not pass it on",
        )
    elif fit.statistics == "moving" and False in fit.training and case.written is None:
        yield (
            "inference_mode_in_fit",
            "training=False reaches it in fit: it is called with it, or a layer before it is, "
            f"which Keras {keras.__version__} hands on to the layers called after it",
        )
    elif fit.statistics == "batch" and not fit.learned and layer.trainable_variables:
        yield "no_gradient", "gamma and beta did not change in fit: no gradient reached them"


def _own_call(case: _Case) -> Iterator[tuple[str, str]]:
    """Where a custom subclass decides by itself what normalises."""
    if not has_own_call(case.spot.layer):
        return
    entries: dict[str, list[str]] = {}
    for entry, mode in case.modes.items():
        for one in mode.calls:
            trains = one.training is True and one.policy in ("none", "affine")
            asked = "batch" if trains else "moving"
            if one.training != "a tensor" and one.statistics not in ("unknown", asked):
                entries.setdefault(one.statistics, []).append(entry)
    if entries:
        uses = "; ".join(f"{_USED[s]} in {', '.join(dict.fromkeys(e))}" for s, e in entries.items())
        yield (
            "own_call",
            f"its class {type(case.spot.layer).__name__} has a call() of its own, which normalises "
            f"with {uses}, whatever training= and trainable ask for",
        )


_USED = {
    "batch": "the batch's own statistics",
    "moving": "the moving statistics",
    "neither": "something else than the batch's own or the moving statistics",
}


def _written(case: _Case) -> Iterator[tuple[str, str]]:
    """Where a ``training`` value is written into the graph."""
    if case.written is None or policy_of(case.spot.layer) == "all":
        return
    where, value = case.written
    where = "at its call" if where == case.spot.path else f"at the call of '{where}'"
    fit = case.modes["fit"].statistics
    if not value and fit == "batch":
        yield (
            "baked_false_ignored",
            f"training=False is written into the model {where}, but fit overrides it (Keras "
            f"{keras.__version__}): the moving statistics change after all. "
            "truenorm.freeze(model) keeps them",
        )
    elif not value:
        yield "baked_false", f"training=False is written into the model {where}, and fit obeys it"
    else:
        used = [entry for entry in INFERENCE if case.modes[entry].statistics == "batch"]
        effect = f"so the batch normalises in {', '.join(used)}" if used else "and is overridden"
        yield "baked_true", f"training=True is written into the model {where}, {effect}"


def _inference(case: _Case) -> Iterator[tuple[str, str]]:
    """Where a bare call runs in training mode without being asked to."""
    if case.modes["model(x)"].statistics != "batch" or (case.written and case.written[1]):
        return
    culprit = case.whole.first_in_training_mode
    yield (
        "bare_call_trains",
        "model(x) without training= runs it in training mode"
        + (
            f": '{culprit.name}' ({type(culprit).__name__}) before it has training=True, written "
            f"or as its default, which Keras {keras.__version__} hands on to the layers called "
            "after it. Call model(x, training=False)"
            if culprit is not None
            else ""
        ),
    )


def _in_training_mode_by_itself(model: Any) -> Iterator[Any]:
    """The layers that run in training mode where nobody asks for it, in the order of calls."""
    if graph_of(model) is None:
        its_calls = ((layer, None) for layer in layers_in(model, itself=False))
    else:
        its_calls = ((call.operation, call.written) for call in calls(model))
    for layer, written in its_calls:
        argument = inspect.signature(type(layer).call).parameters.get("training")
        default = argument is not None and argument.default is True
        if written[1] if written is not None else default:
            yield layer
