"""What the rules look at, each fact found out once and only if a rule asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import keras
import numpy as np

from truenorm._diagnosis.measuring import Answers, Runner, Seen, ask, judge_of, look, no_data
from truenorm._keras_internals import inner_optimizer
from truenorm._model.data import labelled_batches
from truenorm._model.graph import Call, calls, graph_of
from truenorm._model.sites import batch_normalizations, is_own_class, site_calls
from truenorm._modes.inspect import inspect
from truenorm._records.inspection import Inspection
from truenorm._records.recalibration import Gap
from truenorm._statistics.recalibrate import gaps

Need = Literal["graph", "data", "batches", "inputs"]

FEWEST_BATCHES = 8
"""Of how many batch means a variance is taken at least: it is then known within a factor of two
(95 % of a chi-squared variable with 7 degrees of freedom is between 0.24 and 2.3 of its mean), and
the mean over the channels much better."""


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
    """

    model: Any
    data: Any
    y: Any
    batch_size: int

    def lacks(self, need: Need) -> str | None:
        """Why a rule that needs this cannot run; None if it can."""
        if need == "graph":
            return None if self.graph else "the model is subclassed, so its graph cannot be read"
        if need == "inputs":
            known = self.graph or self.data is not None
            return None if known else "a subclassed model does not say what its inputs are"
        if self.data is None:
            return "no data was given"
        own = [path for layer, path in self.layers.items() if is_own_class(layer)]
        if own:
            return f"what the class of '{own[0]}' normalises is not known"
        for path, moments in self.seen.training.sites.items():
            if not np.isfinite(moments.m2).all():
                return f"the data makes values at '{path}' that are not finite numbers"
        if need == "batches" and self.seen.full_batches < FEWEST_BATCHES:
            count = self.seen.full_batches
            return f"{FEWEST_BATCHES} whole batches show how batches vary, and there are {count}"
        return None

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The data once more; arrays shuffled, so that a sorted set has the batches of training."""
        return labelled_batches(self.model, self.data, self.batch_size, y=self.y, shuffle=True)

    @cached_property
    def layers(self) -> Mapping[Any, str]:
        """Path of every BatchNormalization."""
        return batch_normalizations(self.model)

    @cached_property
    def graph(self) -> bool:
        """Whether the calls can be read."""
        return graph_of(self.model) is not None

    @cached_property
    def calls(self) -> list[Call]:
        """Every call of the model's graph."""
        return calls(self.model)

    @cached_property
    def sites(self) -> list[Call]:
        """The calls that are a BatchNormalization."""
        return site_calls(self.model)[0]

    @cached_property
    def optimizer(self) -> Any | None:
        """What the model is trained with, without the loss scaling around it."""
        optimizer = getattr(self.model, "optimizer", None)
        return optimizer and (inner_optimizer(optimizer) or optimizer)

    @cached_property
    def steps(self) -> int:
        """How often the optimizer has stepped; 0 if there is none."""
        return 0 if self.optimizer is None else int(self.optimizer.iterations)

    @cached_property
    def inspection(self) -> Inspection:
        """What every site does in each entry point."""
        if self.data is None:
            return inspect(self.model)
        inputs, _ = self._first_batch
        fixed = any(tensor.shape[0] for tensor in getattr(self.model, "inputs", None) or ())
        few = inputs if fixed else keras.tree.map_structure(lambda x: x[:FEW], inputs)
        return inspect(self.model, few)

    @cached_property
    def seen(self) -> Seen:
        """What every site sees of the data."""
        return look(self._runner, self.batches)

    @cached_property
    def gaps(self) -> Mapping[str, Gap]:
        """How far every layer's moving statistics are from the population."""
        return {gap.path: gap for gap in gaps(self.model, self.seen.training)}

    @cached_property
    def answers(self) -> Answers:
        """What the model gives in training and in inference."""
        return ask(self._runner, self.batches, self.seen.training, self._judge)

    @cached_property
    def _runner(self) -> Runner:
        return Runner(self.model, self.layers)

    @cached_property
    def _first_batch(self) -> tuple[Any, Any]:
        """The first batch with a sample in it."""
        for inputs, labels in self.batches():
            if len(keras.tree.flatten(inputs)[0]):
                return inputs, labels
        raise no_data()

    @cached_property
    def _judge(self) -> Any | None:
        labelled = self._first_batch[1] is not None
        return judge_of(self.model) if labelled and self.model.compiled else None
