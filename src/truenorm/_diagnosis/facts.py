"""What the rules look at, each fact found out once and only if a rule asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import keras
import numpy as np

from truenorm._diagnosis.loss import Judge
from truenorm._diagnosis.measuring import Answers, Scores, Seen, When, ask, look, no_data
from truenorm._errors import KerasVersionError
from truenorm._keras_internals import inner_optimizer, is_compiled
from truenorm._model.data import comes_in_batches, labelled_batches, number_of_batches
from truenorm._model.graph import Call, Graph, graph_of, parents_in, read_graph
from truenorm._model.progress import NOWHERE, Line, counted_batches
from truenorm._model.sites import batch_normalizations, is_own_class, policy_of, spots
from truenorm._model.values import numbers
from truenorm._modes.inspect import inspect
from truenorm._records.inspection import Inspection
from truenorm._records.moments import Array, Spread
from truenorm._records.recalibration import Gap
from truenorm._rewrites.fold import why_not_folded_alone
from truenorm._rewrites.replace import why_not_replaced
from truenorm._statistics.recalibrate import gaps
from truenorm._statistics.runner import Runner, Use

Need = Literal["graph", "data", "batches", "modes"]

FEWEST_BATCHES = 8
"""Of how many batch means a variance is taken at least: it is then known within a factor of two
(95 % of a chi-squared variable with 7 degrees of freedom is between 0.24 and 2.3 of its mean), and
the mean over the channels much better."""

MIXED_BATCHES = 16
"""Batches of mixed samples that batches as they come are compared with."""

FEW = 4
"""Samples that ``inspect`` gets: modes do not depend on the data."""


@dataclass(frozen=True, eq=False)
class Facts:
    """A model, the data given with it, and all that follows from them.

    Args:
        model: The model; nothing in it changes.
        data: As :func:`truenorm.diagnose` takes it; can be read several times. None: no data.
        y: Labels of array data, if they are not in ``data``.
        batch_size: Of array data.
        line: Says what is being found out.
        observed: What the layers did in ``fit``, where that was seen; None: they are tried out.
        variances: Of the batches in ``fit``, per layer path, where they were seen.
        runner: Of the model, with its outputs, where there is one already.
    """

    model: Any
    data: Any
    y: Any
    batch_size: int
    line: Line = NOWHERE
    observed: Inspection | None = None
    variances: Mapping[str, Array] = field(default_factory=dict[str, Array])
    runner: Runner | None = None

    def lacks(self, need: Need) -> str | None:
        """Why a rule that needs this cannot run; None if it can."""
        if need == "graph":
            return None if self.graph else "the model is subclassed, so its graph cannot be read"
        if need == "modes":
            found = self._inspected
            return None if isinstance(found, Inspection) else found
        if self.data is None:
            return "no data was given"
        own = [path for layer, path in self.layers.items() if is_own_class(layer)]
        if own:
            return f"what the class of '{own[0]}' normalises is not known"
        for path, moments in self.seen.training.sites.items():
            if not np.isfinite(moments.m2).all():
                return f"the data makes values at '{path}' that are not finite numbers"
        count = self.seen.training.batches
        if need == "batches" and count < FEWEST_BATCHES:
            return f"{FEWEST_BATCHES} batches show how batches vary, and there are {count}"
        return None

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The data once more; arrays shuffled, so that a sorted set has the batches of training."""
        found = labelled_batches(self.model, self.data, self.batch_size, y=self.y, shuffle=True)
        total = number_of_batches(self.model, self.data, self.batch_size)
        return counted_batches(found, self.line, "reading the data", total)

    # --- the model -----------------------------------------------------------------------------

    @cached_property
    def not_replaced(self) -> Mapping[str, str]:
        """Path of every site that ``replace`` leaves stock, and why."""
        return why_not_replaced(self.model, "truenorm")

    @cached_property
    def layers(self) -> Mapping[Any, str]:
        """Path of every BatchNormalization."""
        return batch_normalizations(self.model)

    @cached_property
    def graph(self) -> Graph | None:
        """The calls, where they can be read."""
        return None if graph_of(self.model) is None else read_graph(self.model)

    @cached_property
    def parents(self) -> Mapping[Any, Sequence[Any]]:
        """What each layer is inside of, from the outermost."""
        return parents_in(self.model)

    @cached_property
    def not_folded_alone(self) -> Mapping[str, str]:
        """Path of every site that stays where it alone is to be folded, and why."""
        return why_not_folded_alone(read_graph(self.model))

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every call of the model's graph."""
        return self.graph.calls if self.graph else ()

    @property
    def sites(self) -> tuple[Call, ...]:
        """The calls that are a BatchNormalization."""
        return self.graph.sites if self.graph else ()

    @cached_property
    def optimizer(self) -> Any | None:
        """What the model is trained with, without the loss scaling around it."""
        optimizer = getattr(self.model, "optimizer", None)
        return optimizer and (inner_optimizer(optimizer) or optimizer)

    @cached_property
    def steps(self) -> int:
        """How often the optimizer has stepped; 0 if there is none."""
        return 0 if self.optimizer is None else int(numbers(self.optimizer.iterations))

    # --- modes ---------------------------------------------------------------------------------

    @property
    def inspection(self) -> Inspection:
        """What every site does in each entry point; there where :meth:`lacks` says nothing."""
        found = self._inspected
        if isinstance(found, Inspection):
            return found
        raise ValueError(found)

    @cached_property
    def held(self) -> frozenset[Any]:
        """The layers that normalise with their moving statistics in ``fit``: it learned with them.

        As observed; where that cannot be, those that are frozen.
        """
        found = self._inspected
        if not isinstance(found, Inspection):
            return frozenset(k for k in self.layers if policy_of(k) in ("all", "statistics"))
        did = zip(spots(self.model), found.modes.get("fit", ()), strict=False)
        used: dict[Any, set[str | None]] = {}
        for spot, mode in did:
            used.setdefault(spot.layer, set()).add(mode.statistics)
        return frozenset(layer for layer, of in used.items() if of == {"moving"})

    @cached_property
    def _inspected(self) -> Inspection | str:
        """The inspection, or why there is none."""
        if self.observed is not None:
            return self.observed
        if self.data is None and not self.graph:
            return "a subclassed model does not say what its inputs are"
        attempts: list[tuple[Any, ...]] = [()]
        if self.data is not None:
            inputs, labels = self._first_batch
            fixed = any(tensor.shape[0] for tensor in getattr(self.model, "inputs", None) or ())
            few = slice(None if fixed else FEW)
            attempts = [(keras.tree.map_structure(lambda x: x[few], inputs),)]
            if labels is not None and is_compiled(self.model):
                with_labels = (*attempts[0], keras.tree.map_structure(lambda x: x[few], labels))
                attempts.insert(0, with_labels)
        reason = ""
        self.line.step("running every entry point")
        for arguments in attempts:
            try:
                inspection = inspect(self.model, *arguments, progress=False)
                if "fit" in inspection.modes:
                    return inspection
                reason = f"inspect could not run the model ({inspection.not_run['fit']})"
            except KerasVersionError:
                raise
            except Exception as error:  # what a train_step or a metric of the user's own may do
                first, *_ = [*str(error).strip().splitlines(), ""]
                reason = f"inspect could not run the model ({type(error).__name__}: {first})"
        return reason

    # --- the data ------------------------------------------------------------------------------

    @cached_property
    def seen(self) -> Seen:
        """What every site sees of the data in training."""
        mixed = MIXED_BATCHES if comes_in_batches(self.model, self.data) else 0
        return look(self._runner, self._training, self.batches, self._judge, mixed)

    @property
    def spread(self) -> Mapping[str, Spread]:
        """How much batches of samples drawn at random differ, per layer path."""
        return (self.seen.shuffled or self.seen.training).spread

    @cached_property
    def gaps(self) -> Mapping[str, Gap]:
        """How far every layer's moving statistics are from the population."""
        return {gap.path: gap for gap in gaps(self.model, self.seen.training)}

    @cached_property
    def answers(self) -> Answers:
        """What the model gives in inference, and would once recalibrated."""
        population = self.seen.training
        learning = {p: m for p, m in population.sites.items() if p not in self._held_paths}
        return self._ask(
            {
                "in_inference": self._runner.moving(),
                "recalibrated": self._runner.given(replace(population, sites=learning)),
            }
        )

    @property
    def inference(self) -> Answers:
        """What the model gives in inference; of a healthy one with a loss no rule asks for more."""
        enough = self.seen.scores and self.seen.training.batches > 1
        return self._alone if enough and "answers" not in self.__dict__ else self.answers

    @cached_property
    def _alone(self) -> Answers:
        return self._ask({"in_inference": self._runner.moving()})

    def _ask(self, uses: Mapping[When, Use]) -> Answers:
        return ask(self._runner, uses, self.batches, self._judge, self.seen.training.batches)

    @property
    def compared(self) -> tuple[int, ...] | None:
        """On how many batches training and inference were compared, of how many; None: on all."""
        known = self.__dict__
        answers: Answers | None = known.get("answers") or known.get("_alone")
        if answers is None or len(answers.batches) == self.seen.training.batches:
            return None
        return len(answers.batches), self.seen.training.batches

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return self.data is not None and self._first_batch[1] is not None

    @property
    def scored(self) -> bool:
        """Whether the model's own loss could be computed, each way to normalise."""
        return bool(self.seen.scores and all(self.inference.scores.values()))

    @property
    def unscored(self) -> str | None:
        """Why the loss means nothing, where a rule has asked for it and that was seen."""
        judge: Judge | None = self.__dict__.get("_judge")
        return None if judge is None else judge.why_not

    def scores(self, when: When) -> Scores:
        """The loss and the metrics, one value per batch that was compared."""
        if when == "in_training":
            return {n: one[[*self.inference.batches]] for n, one in self.seen.scores.items()}
        return (self.answers if when == "recalibrated" else self.inference).scores[when]

    def score(self, when: When, name: str) -> float:
        """The loss or a metric over all that was compared."""
        return float(np.average(self.scores(when)[name], weights=self.inference.sizes))

    @cached_property
    def _held_paths(self) -> frozenset[str]:
        return frozenset(self.layers[layer] for layer in self.held)

    @cached_property
    def _training(self) -> Use:
        """What every layer normalises with in training."""
        use, moving = self._runner.own(), self._runner.moving()
        for path in self._held_paths:
            part = self._runner.slices[path]
            use.given[part] = True
            use.mean[part], use.variance[part] = moving.mean[part], moving.variance[part]
        return use

    @cached_property
    def _runner(self) -> Runner:
        return self.runner or Runner(self.model, self.layers, outputs=True)

    @cached_property
    def _first_batch(self) -> tuple[Any, Any]:
        """The first batch with a sample in it."""
        for inputs, labels in self.batches():
            if len(keras.tree.flatten(inputs)[0]):
                return inputs, labels
        raise no_data()

    @cached_property
    def _judge(self) -> Judge | None:
        if self._first_batch[1] is None or not is_compiled(self.model):
            return None
        judge = Judge(self.model)
        return judge if judge.able else None
