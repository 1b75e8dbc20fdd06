"""An optimizer whose variables change between steps stays the same object and keeps its slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import keras

from truenorm._errors import ModelError
from truenorm._keras_internals import (
    LEARNING_RATE,
    inner_optimizer,
    learning_rate,
    strategy_of,
    trainable_when_compiled,
    updated_variables,
    weight_averages,
)
from truenorm._model.hooks import patched
from truenorm._model.trainer import has_optimizer, make_anew
from truenorm._model.values import numbers

OptimizerState = dict[tuple[str, int], Any]


def follow(models: Iterable[Any], layers: Iterable[Any], known: dict[Any, OptimizerState]) -> None:
    """Make what was compiled obey the flags as they are now."""
    built = [one for one in models if has_optimizer(one)]
    fresh = {one: _fresh_for(one.optimizer, one.trainable_variables) for one in built}
    for model in models:
        noted = trainable_when_compiled(model)
        noted.update({layer: layer.trainable for layer in layers if layer in noted})
        if fresh.get(model) is not None:
            _renew(model.optimizer, fresh[model], known.get(model, {}))
        make_anew(model)  # also while fit is running


def _fresh_for(optimizer: Any, variables: list[Any]) -> Any | None:
    """A new optimizer like this one, built for these variables; None if this one is already."""
    if [*map(id, variables)] == [*map(id, updated_variables(optimizer))]:
        return None
    strategy = strategy_of(optimizer)
    with nullcontext() if strategy is None else strategy.scope():
        fresh = _like(optimizer)
        fresh.build(variables)
    return fresh


def _like(optimizer: Any) -> Any:
    """An optimizer of the same settings; a schedule of the learning rate is the very same."""
    inner = inner_optimizer(optimizer)
    if inner is not None:
        return type(optimizer)(
            _like(inner),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    rate = learning_rate(optimizer)
    try:
        if isinstance(rate, keras.Variable):
            return type(optimizer).from_config(optimizer.get_config())
        with patched([(optimizer, LEARNING_RATE, 0.0)]):  # it may have no config
            config = optimizer.get_config()
        return type(optimizer).from_config({**config, "learning_rate": rate})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            "The model's optimizer cannot be made again from its config; nothing was changed",
            where=optimizer.name,
            received=str(error).strip().splitlines()[0],
            remedy="give its class a complete get_config(), or freeze before fit and compile again",
        ) from error


def _renew(optimizer: Any, fresh: Any, known: OptimizerState) -> None:
    """Make the optimizer, the same object, the fresh one; it keeps what it has learned.

    Args:
        optimizer: A built optimizer.
        fresh: One like it, built for what is to be updated from now on.
        known: What it once knew of variables that it does not update at the moment.
    """
    known = known | state_of(optimizer)
    _become(optimizer, fresh)
    names = Counter(variable.name for variable in optimizer.variables)
    before = Counter(name for name, _ in known)
    _start_averages(optimizer)
    for key, variable in _keyed(optimizer):
        # Of two variables with one name it is not known which went: they start anew.
        if key in known and names[key[0]] == before[key[0]]:
            variable.assign(known[key])


def _start_averages(optimizer: Any) -> None:
    """Averages of weights start at the weights: Keras does it in the first iteration only."""
    optimizer = inner_optimizer(optimizer) or optimizer
    if optimizer.use_ema:
        averages = weight_averages(optimizer)
        for variable, average in zip(updated_variables(optimizer), averages, strict=True):
            average.assign(numbers(variable))


def _become(optimizer: Any, fresh: Any) -> None:
    """Take over all of the fresh optimizer; objects inside that users may hold stay themselves."""
    for name, value in vars(fresh).items():
        if isinstance(value, keras.optimizers.Optimizer):  # in a LossScaleOptimizer
            _become(getattr(optimizer, name), value)
        else:
            vars(optimizer)[name] = value


def state_of(optimizer: Any) -> OptimizerState:
    return {key: numbers(variable) for key, variable in _keyed(optimizer)}


def _keyed(optimizer: Any) -> Iterator[tuple[tuple[str, int], Any]]:
    """Each variable under its name, which holds the path of the model's, and which of that name."""
    seen: Counter[str] = Counter()
    for variable in optimizer.variables:
        yield (variable.name, seen[variable.name]), variable
        seen[variable.name] += 1
