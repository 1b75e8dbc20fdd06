"""One pass over the data: the moments of every BatchNormalization's input, batch by batch, merged.

Each layer's call is intercepted while the model runs compiled in inference mode: the sums of its
input are taken on the device (:mod:`truenorm._kernels.sums`), and the layer goes on with the
statistics that it is to use instead of its moving ones. Variables are given to the program as
values and put nowhere, so nothing in the model can change, however the pass ends; state of other
layers (random seeds, stateful layers) is carried from batch to batch as ``predict`` would, and
dropped at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from truenorm import _kernels as kernels
from truenorm._keras_internals import layers_in
from truenorm._kernels import sums as collecting
from truenorm._model.hooks import intercepted
from truenorm._records.moments import Array, Moments, Spread

ops: Any = keras.ops


@dataclass(frozen=True)
class Use:
    """Which statistics each channel of each layer normalises with, layer after layer.

    Either those given, or the batch's own (its mean plus ``mean`` of its standard deviations, its
    variance times ``variance``).

    Args:
        given: Whether they are given, shape ``(channels of all layers,)``.
        mean: The mean, or the offset.
        variance: The variance, or the factor.
    """

    given: np.ndarray[Any, np.dtype[np.bool_]]
    mean: Array
    variance: Array

    @classmethod
    def own(cls, channels: int) -> Use:
        """The batch's own, as in training."""
        return cls(np.zeros(channels, bool), np.zeros(channels), np.ones(channels))


@dataclass(frozen=True)
class Seen:
    """What one pass saw.

    Args:
        sites: Moments per layer path, in the order of the first call.
        spread: How much the batches differ, per layer path.
        calls: How often each layer was called per batch.
        samples: Samples seen.
        batches: Batches seen.
    """

    sites: Mapping[str, Moments]
    spread: Mapping[str, Spread]
    calls: Mapping[str, int]
    samples: int
    batches: int


class Collector:
    """Runs a model in inference mode and merges the moments of every BatchNormalization's input.

    Args:
        model: Any built Keras model.
        layers: Its BatchNormalization layers with their paths.
    """

    def __init__(self, model: Any, layers: Mapping[Any, str]) -> None:
        self.model, self.layers = model, layers
        sizes = [int(layer.moving_mean.shape[0]) for layer in layers]
        ends = np.cumsum([0, *sizes]).tolist()
        self.channels = ends[-1]
        self.slices = {
            path: slice(start, end)
            for path, start, end in zip(layers.values(), ends, ends[1:], strict=False)
        }
        self.epsilons = {path: float(layer.epsilon) for layer, path in layers.items()}
        self.variables: list[Any] = list(model.variables)
        own = {id(variable) for layer in layers for variable in layer.variables}
        self._carried = [
            i for i, v in enumerate(self.variables) if not v.trainable and id(v) not in own
        ]
        wide = any(kernels.statistics_dtype(k.moving_mean.dtype) == "float64" for k in layers)
        self._dtype = "float64" if wide else "float32"
        jit = not getattr(model, "run_eagerly", False) and all(
            getattr(layer, "supports_jit", True) for layer in layers_in(model)
        )
        self._called: tuple[str, ...] = ()
        self._run = collecting.compiled(self._forward, jit)

    def moving(self) -> Use:
        """The moving statistics as they are."""
        wide = [
            [np.asarray(ops.convert_to_numpy(ops.cast(v, self._dtype)), np.float64) for v in pair]
            for pair in ((k.moving_mean, k.moving_variance) for k in self.layers)
        ]
        means, variances = (np.concatenate(part) for part in zip(*wide, strict=True))
        return Use(np.ones(self.channels, bool), means, variances)

    def one_pass(
        self,
        batches: Iterable[Any],
        use: Use,
        enough: Callable[[Seen], bool] | None = None,
    ) -> Seen:
        """Moments over all batches, or until there are enough."""
        table = ops.convert_to_tensor(
            np.stack([use.given, use.mean, use.variance]).astype(self._dtype)
        )
        state = [ops.convert_to_tensor(variable) for variable in self.variables]
        tally = _Tally(self.slices)
        waiting: tuple[Any, ...] | None = None
        for inputs in batches:
            size = len(keras.tree.flatten(inputs)[0])
            if not size:
                continue
            counts, sums, carried = self._run(state, table, inputs)
            for index, value in zip(self._carried, carried, strict=True):
                state[index] = value
            # The device works on this batch while the host adds the one before.
            now = (self._called, counts, sums, size)
            if waiting is not None:
                tally.add(*waiting)
                if enough is not None and enough(tally.seen()):
                    break
            waiting = now
        else:
            if waiting is not None:
                tally.add(*waiting)
                if enough is not None:
                    enough(tally.seen())
        return tally.seen()

    def _forward(self, state: Any, table: Any, inputs: Any) -> tuple[Any, Any, list[Any]]:
        called: list[str] = []
        counts: list[Any] = []
        sums: list[Any] = []
        mapping = zip(self.variables, state, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:

            def handle(layer: Any, original: Any, x: Any, mask: Any = None, **__: Any) -> Any:
                count, found = collecting.batch_sums(x, axis=layer.axis, mask=mask)
                called.append(self.layers[layer])
                counts.append(count)
                sums.append(found)
                own = table[:, self.slices[called[-1]]]
                mean, variance = _in_use(layer, own, count, found)
                scope.add_update((layer.moving_mean, mean))
                scope.add_update((layer.moving_variance, variance))
                return original(x, training=False)

            with intercepted(self.layers, handle):
                self.model(inputs, training=False)
            carried = [scope.get_current_value(self.variables[i]) for i in self._carried]
        self._called = tuple(called)
        return ops.stack(counts), collecting.joined(sums), carried


def _in_use(layer: Any, own: Any, count: Any, found: Any) -> tuple[Any, Any]:
    """The statistics that a call normalises with; the layer's own if the batch has no value."""
    moving_mean, moving_variance = layer.moving_mean.value, layer.moving_variance.value
    dtype = kernels.statistics_dtype(moving_mean.dtype)
    shift, first, second, given, mean, variance = (
        ops.cast(row, dtype) for part in (found, own) for row in (part[0], part[1], part[2])
    )
    some = ops.cast(ops.maximum(count, 1), dtype)
    delta = first / some
    batch_variance = second / some - ops.square(delta)
    batch_variance = ops.where(batch_variance < 0, 0.0, batch_variance)
    batch_mean = shift + delta
    known = count > 0
    batch_mean = ops.where(known, batch_mean, ops.cast(moving_mean, dtype))
    batch_variance = ops.where(known, batch_variance, ops.cast(moving_variance, dtype))
    return (
        ops.where(given > 0, mean, batch_mean + mean * ops.sqrt(batch_variance)),
        ops.where(given > 0, variance, batch_variance * variance),
    )


class _Tally:
    """Adds batches up, all layers' channels side by side; a pass has one order of calls."""

    def __init__(self, slices: Mapping[str, slice]) -> None:
        self.widths = {path: s.stop - s.start for path, s in slices.items()}
        self.paths = list(slices)
        self.parts: dict[tuple[str, ...], tuple[Moments, Spread]] = {}
        self.samples = self.batches = 0

    def add(self, called: tuple[str, ...], counts: Any, sums: Any, samples: int) -> None:
        each = np.asarray(ops.convert_to_numpy(counts), np.float64)
        count = np.repeat(each, [self.widths[path] for path in called])
        batch = Moments.from_sums(count, *np.asarray(ops.convert_to_numpy(sums), np.float64))
        part = batch, Spread.of(batch)
        if called in self.parts:
            before = self.parts[called]
            part = before[0].merge(part[0]), before[1].merge(part[1])
        self.parts[called] = part
        self.samples, self.batches = self.samples + samples, self.batches + 1

    def seen(self) -> Seen:
        sites: dict[str, Moments] = {}
        spread: dict[str, Spread] = {}
        calls: dict[str, int] = {}
        for called, (moments, of_batches) in self.parts.items():
            start = 0
            for path in called:
                own = slice(start, start + self.widths[path])
                start = own.stop
                calls[path] = max(calls.get(path, 0), called.count(path))
                if path in sites:
                    sites[path] = sites[path].merge(moments[own])
                    spread[path] = spread[path].merge(of_batches[own])
                else:
                    sites[path], spread[path] = moments[own], of_batches[own]
        return Seen(sites, spread, calls, self.samples, self.batches)
