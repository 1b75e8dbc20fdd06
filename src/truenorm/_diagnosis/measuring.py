r"""A model run over a data set in three modes: what its layers see, what it answers.

Every BatchNormalization normalises with the batch's statistics (as in training), with its moving
statistics (as in inference), or with the population's (as after :func:`truenorm.recalibrate`);
which of them is a variable, so that one compiled function serves all. Everything else in the model
runs in inference mode, so that what differs is BatchNormalization's doing alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import keras
import numpy as np

from truenorm import _kernels as kernels
from truenorm._errors import DataError
from truenorm._kernels.masks import aligned
from truenorm._model.hooks import intercepted
from truenorm._model.trainer import compile_like
from truenorm._records.moments import Array, Moments
from truenorm._records.population import Population

ops: Any = keras.ops

Mode = Literal["batch", "moving", "population"]
MODES: tuple[Mode, ...] = ("batch", "moving", "population")

Batches = Callable[[], Iterable[tuple[Any, Any]]]
"""Reads the data once more: inputs and labels, batch by batch."""


@dataclass(frozen=True)
class Seen:
    """What the BatchNormalization layers see, in training and in inference.

    Args:
        training: The population of each site's input where the layers before it normalise with
            the batch's statistics.
        inference: The same where they normalise with their moving statistics.
        calls: Per path, the moments of each call of the layer in one run of the model.
        means: Per path, the moments of the batches' means: their M2 is what batches differ by.
            Batches smaller than the first are left out.
        full_batches: How many batches were not left out.
    """

    training: Population
    inference: Population
    calls: Mapping[str, tuple[Moments, ...]]
    means: Mapping[str, Moments]
    full_batches: int


@dataclass(frozen=True)
class Answers:
    """What the model gives, depending on the statistics that normalise.

    Args:
        change: Root mean square of ``output(moving) - output(population)`` over the standard
            deviation of ``output(population)``; the largest over the model's outputs.
        scores: Per mode, the loss and the metrics that the model is compiled with, one value per
            batch; empty if there are no labels, no loss, or one that these labels do not make.
        sizes: Samples per batch.
    """

    change: float
    scores: Mapping[Mode, Mapping[str, Array]]
    sizes: Array

    def score(self, mode: Mode, name: str) -> float:
        """The loss or a metric over all the data."""
        return float(np.average(self.scores[mode][name], weights=self.sizes))


class Runner(keras.Model):
    """Runs a model in one of the modes, and gives its outputs and what its layers saw."""

    def __init__(self, model: Any, layers: Mapping[Any, str]) -> None:
        super().__init__(name="runner", dtype="float32", autocast=False)
        self.model = model
        self.mode = self.add_weight(shape=(), initializer="zeros", trainable=False)
        given = {layer: self._variables(layer) for layer in layers}
        self._look = lambda: (layers, given)  # dicts as attributes would be tracked by Keras

    def _variables(self, layer: Any) -> tuple[Any, Any]:
        dtype = kernels.statistics_dtype(layer.moving_mean.dtype)
        shape = layer.moving_mean.shape
        mean, variance = (
            self.add_weight(shape=shape, dtype=dtype, initializer="zeros", trainable=False)
            for _ in range(2)
        )
        return mean, variance

    def give(self, population: Population) -> None:
        """What the mode ``population`` normalises with from now on."""
        layers, given = self._look()
        for layer, path in layers.items():
            if path in population.sites:
                mean, variance = given[layer]
                mean.assign(population.sites[path].mean.astype("float32"))
                variance.assign(population.sites[path].variance.astype("float32"))

    def run(self, mode: Mode, inputs: Any) -> tuple[Any, dict[str, list[Moments]]]:
        """The model's outputs, and per layer path the moments of the input of each call."""
        self.mode.assign(float(MODES.index(mode)))
        made = self.predict_on_batch(inputs)
        return made["outputs"], {
            path: [_moments(*part) for part in parts] for path, parts in made["sites"].items()
        }

    def call(self, inputs: Any) -> dict[str, Any]:
        layers, given = self._look()
        sites: dict[str, list[tuple[Any, Any, Any]]] = defaultdict(list)

        def handle(layer: Any, _: Any, x: Any, mask: Any = None, **__: Any) -> Any:
            dtype = kernels.statistics_dtype(x.dtype)
            if not keras.backend.is_float_dtype(x.dtype):
                x = ops.cast(x, dtype)
            mask = None if mask is None else aligned(mask, x, layer.axis)
            options = kernels.Options(layer.axis, layer.epsilon, mask)
            batch = kernels.normalize(x, None, None, options)
            sites[layers[layer]].append((batch.count, batch.mean, batch.variance))
            choices = zip(
                (batch.mean, batch.variance),
                (layer.moving_mean, layer.moving_variance),
                given[layer],
                strict=True,
            )
            mean, variance = (
                ops.where(
                    self.mode < 0.5,
                    of_batch,
                    ops.where(self.mode < 1.5, ops.cast(moving, dtype), ops.cast(known, dtype)),
                )
                for of_batch, moving, known in choices
            )
            outputs = ops.batch_normalization(
                ops.cast(x, dtype),
                mean,
                variance,
                layer.axis,
                *(None if w is None else ops.cast(w, dtype) for w in (layer.beta, layer.gamma)),
                layer.epsilon,
            )
            outputs = ops.cast(outputs, layer.compute_dtype)
            activation = getattr(layer, "activation", None)  # truenorm's layers may have one inside
            return outputs if activation is None else activation(outputs)

        with intercepted(layers, handle):
            outputs = self.model(inputs, training=False)
        return {"outputs": outputs, "sites": dict(sites)}


def look(runner: Runner, batches: Batches) -> Seen:
    """One reading of the data, in training and in inference mode."""
    merged: dict[str, dict[str, Moments]] = {"batch": {}, "moving": {}}
    calls: dict[str, list[Moments]] = {}
    means: dict[str, Moments] = {}
    samples = count = full = first = 0
    for inputs, _ in batches():
        size = len(keras.tree.flatten(inputs)[0])
        if not size:
            continue
        first = first or size
        samples, count, full = samples + size, count + 1, full + (size >= first)
        for mode in ("batch", "moving"):
            for path, parts in runner.run(mode, inputs)[1].items():
                part = _together(parts)
                merged[mode][path] = _merge(merged[mode].get(path), part)
                if mode == "moving":
                    continue
                pairs = zip_longest(calls.get(path, ()), parts)  # a batch may have fewer calls
                calls[path] = [
                    _together([one for one in pair if one is not None]) for pair in pairs
                ]
                if size >= first:
                    one = Moments(np.minimum(part.count, 1.0), part.mean, np.zeros_like(part.m2))
                    means[path] = _merge(means.get(path), one)
    if not samples:
        raise no_data()
    return Seen(
        Population(merged["batch"], samples, count, "batch", 1),
        Population(merged["moving"], samples, count, "moving", 1),
        {path: tuple(parts) for path, parts in calls.items()},
        means,
        full,
    )


def no_data() -> DataError:
    """What is said of data without a sample."""
    return DataError(
        "There is no data to take statistics of",
        where="data",
        expected="at least one sample",
        received="none",
    )


@dataclass
class _Sum:
    """Sums over one of the model's outputs."""

    squares: float = 0.0
    moments: Moments = field(default_factory=lambda: Moments.zero(1))

    def add(self, moving: Any, population: Any) -> None:
        a, b = (np.asarray(x).astype(np.float64) for x in (moving, population))
        self.squares += float(np.square(a - b).sum())
        self.moments = self.moments.merge(Moments.of(b.reshape(-1, 1)))

    @property
    def change(self) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):  # an output that never varies: NaN
            return float(np.sqrt(np.float64(self.squares) / self.moments.m2[0]))


def ask(runner: Runner, batches: Batches, population: Population, judge: Any) -> Answers:
    """A second reading of the data: the outputs, and what the judge, if any, says of them."""
    runner.give(population)
    sums: list[_Sum] = []
    scores: dict[Mode, dict[str, list[float]]] = {mode: {} for mode in MODES}
    sizes: list[int] = []
    for inputs, labels in batches():
        size = len(keras.tree.flatten(inputs)[0])
        if not size:
            continue
        modes = MODES if judge is not None else MODES[1:]
        outputs: dict[Mode, Any] = {mode: runner.run(mode, inputs)[0] for mode in modes}
        both = (keras.tree.flatten(outputs[mode]) for mode in ("moving", "population"))
        pairs = zip(*both, strict=True)
        for index, pair in enumerate(pairs):
            if index == len(sums):
                sums.append(_Sum())
            sums[index].add(*pair)
        sizes.append(size)
        for mode, made in outputs.items() if judge is not None else ():
            found = _scores(judge, made, labels)
            if found is None:
                judge, scores = None, {}
                break
            for name, value in found.items():
                scores[mode].setdefault(name, []).append(value)
    return Answers(
        max((s.change for s in sums), default=0.0),
        {m: {name: np.asarray(v) for name, v in of.items()} for m, of in scores.items() if of},
        np.asarray(sizes, np.float64),
    )


class _Judge(keras.Model):
    """Takes a model's outputs for its inputs, so that Keras computes loss and metrics of them."""

    def call(self, outputs: Any) -> Any:
        return outputs


def judge_of(model: Any) -> Any | None:
    """What computes the loss and metrics that a model is compiled with; None without a loss."""
    judge = _Judge(name="judge")
    judge.output_names = getattr(model, "output_names", None)  # a loss may be given by them
    compile_like(model, judge)
    if getattr(judge, "loss", None) is None:
        return None
    judge.run_eagerly = True
    return judge


def _scores(judge: Any, outputs: Any, labels: Any) -> dict[str, float] | None:
    """The loss and metrics; None if outputs and labels alone do not make them."""
    judge.reset_metrics()
    try:
        found = judge.test_on_batch(outputs, labels, return_dict=True)
    except (ValueError, TypeError, KeyError):  # labels for a loss of the model's own, as a rule
        return None
    return {name: float(value) for name, value in found.items()}


def _moments(count: Any, mean: Any, variance: Any) -> Moments:
    n = np.full(mean.shape, float(count))
    return Moments(n, mean.astype(np.float64), n * variance.astype(np.float64))


def _merge(old: Moments | None, new: Moments) -> Moments:
    return new if old is None else old.merge(new)


def _together(parts: list[Moments]) -> Moments:
    first, *rest = parts
    for part in rest:
        first = first.merge(part)
    return first
