"""The population statistics of every BatchNormalization over a whole data set.

One pass: each layer's call is intercepted, its input's moments are taken in the compiled function,
and merged on the host in float64 (:mod:`truenorm._moments`). What the layer gives on depends on
``upstream``: which statistics the layers *before* a site normalise with decides what the site sees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import keras
import numpy as np

from truenorm import kernels
from truenorm._data import input_batches
from truenorm._errors import DataError, ModelError, OptionError
from truenorm._graph import Call, calls, is_batch_normalization, layer_paths
from truenorm._interception import intercepted
from truenorm._moments import Moments
from truenorm._probe import as_float64
from truenorm._rebuilding import numbers
from truenorm._records.statistics import Gap, Population, Recalibration
from truenorm._sites import is_own_class, site_calls

ops: Any = keras.ops

Upstream = Literal["batch", "population", "moving"]


def collect(
    model: Any, data: Any, *, upstream: Upstream = "batch", batch_size: int = 32
) -> Population:
    r"""Mean and variance of every BatchNormalization's input over a whole data set.

    For a layer that sees values :math:`x` in batches :math:`b` of :math:`n_b` values each, exactly

    .. math:: \mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \qquad
              \sigma^2 = \frac{\sum_b n_b \left(\sigma_b^2 + (\mu_b - \mu)^2\right)}{\sum_b n_b}

    (law of total variance): weighted by count, with the variance of the batch means, so a ragged
    last batch does no harm. A batch's own moments are taken on the device in float32 at least (each
    mean within about 1e-6 standard deviations where the mean is not much larger than these), and
    merged in float64. The model is run in inference mode and nothing in it changes.

    Args:
        model: Any Keras model; ``upstream="population"`` wants a functional or Sequential one.
        data: What ``fit`` takes: arrays, ``(x, y)``, a PyDataset, or an iterable of batches, read
            once per pass (so no generator for ``"population"``).
        upstream: Which statistics the BatchNormalization layers *before* a site use meanwhile.
            ``"batch"``: the batch's own, as in training; one pass. ``"population"``: the
            population's, as after recalibration; one pass per level of depth. ``"moving"``: the
            moving statistics as they are, which is what inference sees now; one pass.
        batch_size: For arrays only. With ``"batch"`` it should be that of training.

    Returns:
        The population, per layer path; shared layers have the moments of all their calls.

    Raises:
        ModelError: The model has no BatchNormalization, or one of a user's own class; or
            ``upstream`` is ``"population"`` and a layer is not in the graph of the model.
        DataError: The data is empty or does not fit the model.
        OptionError: ``upstream`` is something else.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((1,)), layer])
        >>> population = tn.collect(model, np.array([[1.0], [2.0], [6.0]]), batch_size=2)
        >>> population.sites["bn"].mean.round(4), population.sites["bn"].variance.round(4)
        (array([3.]), array([4.6667]))

    Reference:
        Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3, arXiv:2105.07576.
    """
    layers = _layers(model)
    if upstream not in ("batch", "population", "moving"):
        raise OptionError(
            "There is no such choice of upstream statistics",
            where="upstream",
            expected="'batch', 'population' or 'moving'",
            received=repr(upstream),
        )
    collector = _Collector(model, layers)
    if upstream == "moving":
        for layer in layers:
            collector.give(layer, layer.moving_mean, layer.moving_variance)
    levels = _levels(model) if upstream == "population" else [list(layers)]
    found: dict[str, Moments] = {}
    samples = batches = 0
    for level in levels:
        # What this level sees is settled: all that is upstream of it has been given.
        seen, samples, batches = _one_pass(collector, data, batch_size)
        for layer in level:
            moments = seen.get(layers[layer])
            if moments is not None:
                found[layers[layer]] = moments
                collector.give(layer, moments.mean, moments.variance)
    sites = {path: found[path] for path in layers.values() if path in found}
    return Population(sites, samples, batches, upstream, len(levels))


def recalibrate(
    model: Any, data: Any, *, upstream: Upstream = "batch", batch_size: int = 32
) -> Recalibration:
    """Set every layer's moving statistics to the population's; changes the model in place.

    ``moving_mean`` and ``moving_variance`` (and, with ``renorm``, the statistics that these are
    derived from) become those of :func:`collect`; nothing else changes. It is all or nothing: if
    a value is not a finite number in its variable's dtype, or an exception interrupts, the old
    statistics stand. A channel of which the data has no value keeps its statistics; one of which
    it has one value, its variance.

    Args:
        model: As in :func:`collect`.
        data: As in :func:`collect`: the training set, or a large enough sample of it.
        upstream: As in :func:`collect`.
        batch_size: As in :func:`collect`.

    Returns:
        The population, the gap that there was before, and ``undo()``.

    Raises:
        DataError: Also if the data makes a statistic that is not a finite number.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((1,)), layer])
        >>> done = tn.recalibrate(model, np.array([[1.0], [5.0]]))
        >>> [float(v) for v in keras.ops.convert_to_numpy(layer.moving_mean)]
        [3.0]
        >>> done.undo()
        >>> [float(v) for v in keras.ops.convert_to_numpy(layer.moving_mean)]
        [0.0]
    """
    layers = _layers(model)
    population = collect(model, data, upstream=upstream, batch_size=batch_size)
    before = gaps(model, population)
    old: list[tuple[Any, Any]] = []
    new: list[tuple[Any, Any]] = []
    for layer, path in layers.items():
        for variable, value in _assignments(layer, population.sites.get(path)):
            kept = numbers(variable)
            with np.errstate(over="ignore"):  # infinity in a 16-bit variable: refused below
                value = value.astype(kept.dtype)
            if not np.isfinite(value).all():
                raise DataError(
                    "The data makes statistics that are not finite numbers; nothing was written",
                    where=path,
                    remedy="look for NaN or infinity in the data, or in this layer's inputs",
                )
            old.append((variable, kept))
            new.append((variable, value))

    def undo() -> None:
        for variable, value in old:
            variable.assign(value)

    try:
        for variable, value in new:
            variable.assign(value)
    except BaseException:  # Ctrl-C included: all or nothing
        undo()
        raise
    return Recalibration(population, before, undo)


def gaps(model: Any, population: Population) -> tuple[Gap, ...]:
    """How far each layer's moving statistics are from a population."""
    found: list[Gap] = []
    for layer, path in _layers(model).items():
        if path not in population.sites:
            continue
        moments = population.sites[path]
        variance = moments.variance + layer.epsilon
        shift = np.abs(as_float64(layer.moving_mean) - moments.mean) / np.sqrt(variance)
        ratio = (as_float64(layer.moving_variance) + layer.epsilon) / variance
        with np.errstate(invalid="ignore", divide="ignore"):  # stored variances may be anything
            scale = np.abs(np.log2(ratio)) / 2
        found.append(Gap(path, float(shift.max(initial=0)), float(scale.max(initial=0))))
    return tuple(found)


def _layers(model: Any) -> dict[Any, str]:
    layers = {k: path for k, path in layer_paths(model).items() if is_batch_normalization(k)}
    if not layers:
        raise ModelError("This model has no BatchNormalization", where=model.name)
    for layer, path in layers.items():
        if is_own_class(layer):
            raise ModelError(
                "What a BatchNormalization of somebody's own class normalises is not known",
                where=path,
                expected="Keras's BatchNormalization or truenorm's",
                received=type(layer).__name__,
            )
    return layers


def _levels(model: Any) -> list[list[Any]]:
    """BatchNormalization layers by depth: each level depends on the ones before it only."""
    _, hidden = site_calls(model)
    if hidden:
        raise ModelError(
            "What is upstream of this BatchNormalization cannot be seen",
            where=hidden[0].path,
            expected="every BatchNormalization called in the model's own graph",
            received=hidden[0].reason,
            remedy="use upstream='batch'",
        )
    depth: dict[Call | None, int] = {None: 0}
    level_of: dict[Any, int] = {}
    for call in calls(model):
        depth[call] = max((depth[p] for p in call.producers), default=0)
        if is_batch_normalization(call.operation):
            depth[call] += 1
            level = max(level_of.get(call.operation, 0), depth[call])
            level_of[call.operation] = depth[call] = level
    levels: dict[int, list[Any]] = defaultdict(list)
    for layer, level in level_of.items():
        levels[level].append(layer)
    return [levels[key] for key in sorted(levels)]


def _one_pass(
    collector: _Collector, data: Any, batch_size: int
) -> tuple[dict[str, Moments], int, int]:
    """Moments per layer path over the data as it is now seen; how many samples and batches."""
    seen: dict[str, Moments] = {}
    samples = batches = 0
    for inputs in input_batches(collector.model, data, batch_size):
        size = len(keras.tree.flatten(inputs)[0])
        if not size:
            continue
        for path, parts in collector.predict_on_batch(inputs).items():
            for count, mean, variance in parts:
                n = np.full(mean.shape, float(count))
                part = Moments(n, mean.astype(np.float64), n * variance.astype(np.float64))
                seen[path] = seen[path].merge(part) if path in seen else part
        samples, batches = samples + size, batches + 1
    if not samples:
        raise DataError(
            "There is no data to take statistics of",
            where="data",
            expected="at least one sample",
            received="none",
            remedy="give data that can be read again: a generator is empty after its first pass",
        )
    return seen, samples, batches


class _Collector(keras.Model):
    """Runs a model in inference mode and gives the moments of every BatchNormalization's input.

    Each layer normalises with the batch's statistics until it is given others. What is given is a
    variable, so that all passes run the same compiled function.
    """

    def __init__(self, model: Any, layers: Mapping[Any, str]) -> None:
        super().__init__(name="collector", dtype="float32", autocast=False)
        self.model = model
        given = {layer: self._variables(layer) for layer in layers}
        self._look = lambda: (layers, given)  # dicts as attributes would be tracked by Keras

    def _variables(self, layer: Any) -> tuple[Any, Any, Any]:
        """Whether statistics are given (0 or 1), and which: mean and variance."""
        channels, dtype = layer.moving_mean.shape, kernels.statistics_dtype(layer.moving_mean.dtype)
        flag, mean, variance = (
            self.add_weight(shape=shape, dtype=dtype, initializer="zeros", trainable=False)
            for shape in ((), channels, channels)
        )
        return flag, mean, variance

    def give(self, layer: Any, mean: Any, variance: Any) -> None:
        """From now on this layer normalises with these statistics."""
        flag, given_mean, given_variance = self._look()[1][layer]
        flag.assign(1.0)
        given_mean.assign(numbers(mean))
        given_variance.assign(numbers(variance))

    def call(self, inputs: Any) -> dict[str, list[tuple[Any, Any, Any]]]:
        layers, given = self._look()
        collected: dict[str, list[tuple[Any, Any, Any]]] = defaultdict(list)

        def handle(layer: Any, _: Any, x: Any, mask: Any = None, **__: Any) -> Any:
            batch = kernels.normalize(x, axis=layer.axis, epsilon=layer.epsilon, mask=mask)
            collected[layers[layer]].append((batch.count, batch.mean, batch.variance))
            flag, mean, variance = given[layer]
            dtype = kernels.statistics_dtype(x.dtype)
            outputs = ops.batch_normalization(
                ops.cast(x, dtype),
                ops.where(flag > 0, ops.cast(mean, dtype), batch.mean),
                ops.where(flag > 0, ops.cast(variance, dtype), batch.variance),
                layer.axis,
                *(None if w is None else ops.cast(w, dtype) for w in (layer.beta, layer.gamma)),
                layer.epsilon,
            )
            return ops.cast(outputs, layer.compute_dtype)

        with intercepted(layers, handle):
            self.model(inputs, training=False)
        return dict(collected)


def _assignments(layer: Any, moments: Moments | None) -> Iterator[tuple[Any, Any]]:
    """Which variables get which values; a channel without enough values keeps what it has."""
    if moments is None:
        return
    some, enough = moments.count > 0, moments.count > 1

    def kept_unless(known: Any, variable: Any, value: Any) -> tuple[Any, Any]:
        return variable, np.where(known, value, as_float64(variable))

    yield kept_unless(some, layer.moving_mean, moments.mean)
    yield kept_unless(enough, layer.moving_variance, moments.variance)
    if layer.renorm:  # Keras derives moving_variance from moving_stddev
        deviation = np.sqrt(moments.variance + layer.epsilon)
        yield kept_unless(enough, layer.moving_stddev, deviation)
        yield kept_unless(some, layer.renorm_mean, moments.mean)
        yield kept_unless(enough, layer.renorm_stddev, deviation)
