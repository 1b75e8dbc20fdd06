"""Put the population statistics into a model, all or nothing; and how far its own are from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from truenorm._checks import check_options
from truenorm._errors import DataError
from truenorm._kernels import replicas
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.domains import of_domain, put_back, require_one_domain
from truenorm._model.sites import Layers, batch_normalizations, chosen_layers
from truenorm._model.values import as_float64, numbers, of_replicas
from truenorm._records.moments import Moments
from truenorm._records.population import Population
from truenorm._records.recalibration import Gap, Recalibration
from truenorm._records.tables import counted
from truenorm._statistics.collect import Upstream, collect, known


def recalibrate(
    model: Any,
    data: Any,
    *,
    upstream: Upstream = "batch",
    batch_size: int = 32,
    domain: int | None = None,
    **options: Any,
) -> Recalibration:
    """Set every layer's moving statistics to the population's; changes the model in place.

    ``moving_mean`` and ``moving_variance`` (and, with ``renorm``, the statistics that these are
    derived from) become those of :func:`collect`; nothing else changes. It is all or nothing: if
    a value is not a finite number in its variable's dtype, or an exception interrupts, the old
    statistics stand. A channel of which the data has no value keeps its statistics; one of which
    it has one value, its variance.

    Args:
        model: As in :func:`collect`.
        data: As in :func:`collect`: the training set, or a large enough sample of it. Or a
            ``Population`` that was collected before, perhaps in parts elsewhere and merged.
        upstream: As in :func:`collect`.
        batch_size: As in :func:`collect`.
        domain: As in :func:`collect`: the domain whose statistics are set.
        **options: The other options of :func:`collect`: with ``layers`` only the layers that are
            meant are recalibrated; ``progress=False`` shows nothing while the data is read.

    Returns:
        The population, the gap that there was before, what is left of it, and ``undo()``.

    Raises:
        DataError: Also if the data makes a statistic that is not a finite number, or the
            population is of another model.

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
    check_options(options, collect)
    if domain is not None:
        options |= {"upstream": upstream, "batch_size": batch_size}
        return on_domain(model, domain, lambda single: recalibrate(single, data, **options))
    if isinstance(data, Population):
        population = _part(model, data, options.get("layers"))
    else:
        population = collect(model, data, upstream=upstream, batch_size=batch_size, **options)
    layers = known(_meant(model, population))
    before = gaps(model, population)
    old: list[tuple[Any, Any]] = []
    new: list[tuple[Any, Any]] = []
    for layer, path in layers.items():
        for variable, value in _assignments(layer, population.sites[path]):
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
        after = gaps(model, population)
    except BaseException:  # Ctrl-C included: all or nothing
        undo()
        raise
    return Recalibration(population, before, after, undo)


def _part(model: Any, population: Population, layers: Layers) -> Population:
    """What a population has of the layers that are meant."""
    _meant(model, population)  # which refuses one of another model
    if layers is None:
        return population
    chosen = {*chosen_layers(model, layers).values()}
    sites, spread = (
        {path: value for path, value in of_all.items() if path in chosen}
        for of_all in (population.sites, population.spread)
    )
    if not sites:
        raise DataError(
            "The population has none of the layers that are meant",
            where="layers",
            expected=f"some of {sorted(population.sites)}",
            received=f"{sorted(chosen)}",
            remedy="collect it without layers, or with these",
        )
    return replace(population, sites=sites, spread=spread)


def on_domain(model: Any, domain: int, work: Callable[[Any], Recalibration]) -> Recalibration:
    """What recalibrates a model of one domain, for that domain of a model with several."""
    single = of_domain(model, domain)
    done = work(single)
    return replace(done, undo=put_back(model, single, domain))


def gaps(model: Any, population: Population) -> tuple[Gap, ...]:
    """How far each layer's moving statistics are from a population; those of the worst replica."""
    found: list[Gap] = []
    for layer, path in _meant(model, population).items():
        moments = population.sites[path]
        variance = moments.variance + layer.epsilon
        with np.errstate(invalid="ignore", divide="ignore"):  # stored variances may be anything
            shift = np.abs(of_replicas(layer.moving_mean) - moments.mean) / np.sqrt(variance)
            ratio = (of_replicas(layer.moving_variance) + layer.epsilon) / variance
            scale = np.abs(np.log2(ratio)) / 2
        found.append(Gap(path, float(shift.max(initial=0)), float(scale.max(initial=0))))
    return tuple(found)


def _meant(model: Any, population: Population) -> dict[Any, str]:
    """The layers that a population is of, if it is of this model."""
    layers = batch_normalizations(model)
    require_one_domain(layers)
    ours = {path: int(layer.moving_mean.shape[0]) for layer, path in layers.items()}
    for path, moments in population.sites.items():
        if ours.get(path) != len(moments.mean):
            raise DataError(
                "This population is of another model",
                where=path,
                expected=counted(ours[path], "channel")
                if path in ours
                else f"one of {sorted(ours)}",
                received=counted(len(moments.mean), "channel"),
            )
    return {layer: path for layer, path in layers.items() if path in population.sites}


def _assignments(layer: BatchNormalizationLike, moments: Moments) -> Iterator[tuple[Any, Any]]:
    """Which variables get which values; a channel without enough values keeps what it has.

    The replicas in this process have a variable each.
    """
    some, enough = moments.count > 0, moments.count > 1

    def kept_unless(known: Any, variable: Any, value: Any) -> Iterator[tuple[Any, Any]]:
        for part in replicas.parts(variable):
            yield part, np.where(known, value, as_float64(part))

    yield from kept_unless(some, layer.moving_mean, moments.mean)
    yield from kept_unless(enough, layer.moving_variance, moments.variance)
    if layer.renorm:  # Keras derives moving_variance from moving_stddev
        deviation = np.sqrt(moments.variance + layer.epsilon)
        yield from kept_unless(enough, layer.moving_stddev, deviation)
        yield from kept_unless(some, layer.renorm_mean, moments.mean)
        yield from kept_unless(enough, layer.renorm_stddev, deviation)
