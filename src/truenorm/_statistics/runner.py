"""One batch through a model: what every BatchNormalization sees, and what the model answers.

Each layer's call is intercepted while the model runs compiled in inference mode: the sums of its
input are taken on the device (:mod:`truenorm._kernels.sums`), and the layer goes on with the
statistics that it is to use instead of its moving ones. Variables are given to the program as
values and put nowhere, so nothing in the model can change, however the run ends; state of other
layers (random seeds, stateful layers) is carried from batch to batch as ``predict`` would, and
dropped at the end.

Which layers were called is part of what the program returns, so that a program that was traced for
other shapes cannot answer for this one. A call inside a loop, a condition or a recomputed part of
the model cannot be among what is returned: from there the sums are told while the program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from truenorm import _kernels as kernels
from truenorm._errors import DataError, ModelError, TruenormError, in_one_line
from truenorm._keras_internals import in_symbolic_scope, layers_in, stateless_scope
from truenorm._kernels import sums as collecting
from truenorm._kernels.masks import silent
from truenorm._model.data import size_of
from truenorm._model.graph import graph_of
from truenorm._model.hooks import Wrapper, intercepted, patched, wrapped
from truenorm._records.moments import Array
from truenorm._records.population import Population
from truenorm._statistics.tally import Pass, Tally

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
class Run:
    """What one run of one batch found out.

    Args:
        order: Paths of the layers that the program may call, the first called first.
        calls: Path of the layer of each call; of those that were told while the program ran last.
        sums: Count, shift, S and Q of the channels of all calls side by side, on the device.
        told: The same of the calls that were told.
        outputs: What the model gives; None where that is not wanted.
        samples: Samples in the batch.
    """

    order: tuple[str, ...]
    calls: tuple[str, ...]
    sums: Any
    told: tuple[Array, ...]
    outputs: Any
    samples: int


class Runner:
    """Runs a model in inference mode, its BatchNormalization with any statistics.

    Args:
        model: Any built Keras model.
        layers: Those of its BatchNormalization layers that are looked at, with their paths; others
            normalise with their moving statistics.
        outputs: Whether the model's outputs are wanted.
    """

    def __init__(self, model: Any, layers: Mapping[Any, str], *, outputs: bool = False) -> None:
        self.model, self.layers, self._outputs = model, layers, outputs
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
        # Keras's RNN calls its cell once more to see shapes, except on JAX or where it is unrolled.
        rolled = keras.config.backend() != "jax"
        self._unrolled = [
            (one, "unroll", True)
            for one in layers_in(model)
            if rolled and isinstance(one, keras.layers.RNN) and {*layers_in(one)} & {*layers}
        ]
        self._anew = list(_compiled_apart(layers_in(model)))
        self._told: list[tuple[str, Array]] = []
        self._hidden: str | None = None
        self._refused: ModelError | None = None
        self._program = collecting.compiled(self._forward, jit)

    def own(self) -> Use:
        """The batch's own statistics."""
        return Use.own(self.channels)

    def moving(self) -> Use:
        """The moving statistics as they are."""
        wide = [
            [np.asarray(ops.convert_to_numpy(ops.cast(v, self._dtype)), np.float64) for v in pair]
            for pair in ((k.moving_mean, k.moving_variance) for k in self.layers)
        ]
        means, variances = (np.concatenate(part) for part in zip(*wide, strict=True))
        return Use(np.ones(self.channels, bool), means, variances)

    def given(self, population: Population) -> Use:
        """The population's; the moving statistics of a layer that it does not have."""
        use = self.moving()
        for path, moments in population.sites.items():
            part = self.slices[path]
            use.mean[part], use.variance[part] = moments.mean, moments.variance
        return use

    def using(self, use: Use) -> Callable[[Any], Run]:
        """What runs one batch after the other with these statistics."""
        table = self._table(use)
        state = [ops.convert_to_tensor(variable) for variable in self.variables]

        def run(inputs: Any) -> Run:
            found = self._checked(state, table, inputs)
            for index, value in zip(self._carried, found["carried"], strict=True):
                state[index] = value
            told, self._told = self._told, []
            return Run(
                _names(found["order"]),
                (*_names(found["calls"]), *(path for path, _ in told)),
                found["sums"],
                tuple(sums for _, sums in told),
                found["outputs"],
                size_of(inputs),
            )

        return run

    def _table(self, use: Use) -> dict[str, Any]:
        """One small array per layer.

        Its part of one large array would be other code in each layer, and XLA compiles equal code
        once for all layers: a fifth of the time.
        """
        rows = np.stack([use.given, use.mean, use.variance]).astype(self._dtype)
        return {path: ops.convert_to_tensor(rows[:, p].copy()) for path, p in self.slices.items()}

    def one_pass(
        self, batches: Iterable[Any], use: Use, enough: Callable[[Tally], bool] | None = None
    ) -> Pass:
        """Moments over all batches, or until there are enough."""
        tally = Tally(self.slices)
        for run in _one_behind(map(self.using(use), filter(size_of, batches))):
            tally.add(run)
            if enough is not None and enough(tally):
                break
        return tally.seen()

    def _checked(self, state: Any, table: Any, inputs: Any) -> Any:
        """What the program returns, and all told that is to be told."""
        self._told.clear()
        try:
            found = self._program(state, table, inputs)
            if self._hidden is not None:
                collecting.told()
        except Exception as error:
            if self._hidden is not None:
                self._refused = _out_of_sight(self._hidden, f"{type(error).__name__}: {error}")
            if self._refused is not None:
                raise self._refused from error
            if isinstance(error, ValueError | TypeError) and graph_of(self.model) is None:
                self._refuse(inputs, error)  # others say what they take, and were asked before
            raise
        return found

    def _refuse(self, inputs: Any, error: Exception) -> None:
        if isinstance(error, TruenormError):
            return
        shapes = keras.tree.map_structure(lambda x: f"{tuple(x.shape)} {x.dtype}", inputs)
        raise DataError(
            "The model does not take this data",
            where=self.model.name,
            received=f"{shapes}; {in_one_line(error).rstrip('.')}",
            remedy="give what model(x) takes",
        ) from error

    def _forward(self, state: Any, table: Any, inputs: Any) -> dict[str, Any]:
        order: dict[str, None] = {}
        calls: list[tuple[str, Any, Any]] = []
        program = collecting.program()
        mapping = zip(self.variables, state, strict=True)

        def handle(layer: Any, original: Any, x: Any, mask: Any = None, **given: Any) -> Any:
            path = self.layers[layer]
            added = {name: given[name] for name in given if name == "add"}
            if in_symbolic_scope():  # Keras looks for shapes: nothing is computed
                return original(x, training=False, **added)
            if collecting.is_mapped(x):
                self._refused = _out_of_sight(path, "a vectorised map")
                raise self._refused  # which Keras words anew on the way
            order[path] = None
            count, sums = collecting.batch_sums(x, axis=layer.axis, mask=mask)
            if collecting.program() == program:
                calls.append((path, count, sums))
            else:
                self._hidden = path
                collecting.tell(partial(self._hear, path), collecting.joined([(count, sums)]))
            with _normalising(layer, _in_use(layer, table[path], count, sums)):
                return original(x, training=False, **added)

        with keras.StatelessScope(state_mapping=mapping) as scope:
            with (
                patched(self._unrolled),
                wrapped(self._anew),
                intercepted(self.layers, handle),
            ):
                outputs = self.model(inputs, training=False)
            carried = [scope.get_current_value(self.variables[i]) for i in self._carried]
        return {
            "order": _as_structure(order),
            "calls": _as_structure(path for path, _, _ in calls),
            "sums": collecting.joined([(count, sums) for _, count, sums in calls]),
            "carried": carried,
            "outputs": outputs if self._outputs else None,
        }

    def _hear(self, path: str, sums: Array) -> None:
        self._told.append((path, sums))


def _as_structure(names: Iterable[str]) -> list[dict[str, tuple[()]]]:
    """Names as a structure without a value in it, which a compiled program can return."""
    return [{name: ()} for name in names]


def _names(structure: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(name for one in structure for name in one)


def _compiled_apart(layers: Iterable[Any]) -> Iterator[tuple[Any, str, Wrapper]]:
    """What layers have compiled by themselves: it may have been traced without a look inside."""

    def run(original: Any, *args: Any, **kwargs: Any) -> Any:
        again: Any = collecting.anew(original)
        return again(*args, **kwargs)

    for layer in layers:
        for attributes in (vars(layer), *map(vars, type(layer).__mro__)):
            for name in [n for n, value in attributes.items() if collecting.anew(value)]:
                yield layer, name, run


def _one_behind(runs: Iterable[Run]) -> Iterator[Run]:
    """Each run after the next has begun: the device works on that while the host adds this one."""
    before: Run | None = None
    for run in runs:
        if before is not None:
            yield before
        before = run
    if before is not None:
        yield before


def _out_of_sight(path: str, received: str) -> ModelError:
    return ModelError(
        "What this BatchNormalization sees cannot be told from where it is called",
        where=path,
        expected="a call in a loop, condition or function that the framework can look out of",
        received=received,
        remedy="make it a Python loop (unroll=True for an RNN), without vectorized_map or "
        "jit_compile",
    )


@contextmanager
def _normalising(layer: Any, statistics: tuple[Any, Any]) -> Generator[None]:
    """These in the place of the moving statistics; what was traced inside stays inside."""
    scope, variables = stateless_scope(), (layer.moving_mean, layer.moving_variance)
    before = [variable.value for variable in variables]
    try:
        for update in zip(variables, statistics, strict=True):
            scope.add_update(update)  # as it is: an assignment would round to 16 bits
        yield
    finally:
        for update in zip(variables, before, strict=True):
            scope.add_update(update)


def _in_use(layer: Any, use: Any, count: Any, sums: Any) -> tuple[Any, Any]:
    """The statistics that a call normalises with; the layer's own if the batch has no value."""
    moving_mean, moving_variance = layer.moving_mean.value, layer.moving_variance.value
    dtype = kernels.statistics_dtype(moving_mean.dtype)
    shift, total, squares = ops.unstack(ops.cast(sums, dtype))
    given, mean, variance = ops.unstack(ops.cast(use, dtype))
    given = given > 0
    counted = isinstance(count, int)
    some = max(count, 1) if counted else ops.cast(ops.maximum(count, 1), dtype)
    delta = total / some
    batch_mean = shift + delta
    batch_variance = squares / some - delta * delta
    batch_variance = ops.where(batch_variance < 0, 0.0, batch_variance)  # maximum loses float64
    if not counted or not count:
        known = ops.convert_to_tensor(count) > 0
        batch_mean = ops.where(known, batch_mean, ops.cast(moving_mean, dtype))
        batch_variance = ops.where(known, batch_variance, ops.cast(moving_variance, dtype))
    scaled, shifted = batch_variance * variance, batch_mean + mean * ops.sqrt(batch_variance)
    if not counted and len(count.shape) > 0:  # each channel has its own; a silent one gives beta
        scaled = ops.where(silent(count, 0), np.inf, scaled)
    return ops.where(given, mean, shifted), ops.where(given, variance, scaled)
