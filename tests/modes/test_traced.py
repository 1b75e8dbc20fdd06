"""BatchNormalization inside what a framework traces by itself: loops, conditionals, RNN cells."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from small_models import LAYERS

import truenorm as tn

BACKEND = keras.config.backend()
ops: Any = keras.ops
registered = keras.saving.register_keras_serializable("traced")


@registered
class Cell(keras.layers.Layer):
    """An RNN cell with a BatchNormalization."""

    def __init__(self, kind: str = "keras", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind, self.state_size, self.output_size = kind, 3, 3
        self.bn = KINDS[kind](name="bn")

    def build(self, shape: Any) -> None:
        self.bn.build(shape)

    def call(self, x: Any, states: Any, training: Any = None) -> Any:
        state = ops.tanh(self.bn(x, training=training) + states[0])
        return state, [state]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kind": self.kind}


@registered
class Forced(keras.layers.BatchNormalization):
    """A custom class, judged by its numbers."""

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG002
        return super().call(x, training=False, mask=mask)


KINDS = {**LAYERS, "forced": Forced}
HOW: dict[str, Callable[[Any, Any], Any]] = {
    "cond_taken": lambda f, x: ops.cond(ops.max(x) > -1e9, lambda: f(x), lambda: x * 1.0),
    "cond_left": lambda f, x: ops.cond(ops.max(x) < -1e9, lambda: f(x), lambda: x * 1.0),
    "remat": lambda f, x: keras.remat(f)(x),
    "vectorized_map": lambda f, x: ops.vectorized_map(f, x),
    "map": lambda f, x: ops.map(f, x),
    "while_loop": lambda f, x: ops.while_loop(
        lambda i, _: i < 2, lambda i, t: (i + 1, f(t)), (0, x)
    )[1],
}


@registered
class Inside(keras.layers.Layer):
    """A BatchNormalization inside an operation of Keras that traces what is in it."""

    def __init__(self, how: str, kind: str = "keras", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.how, self.kind = how, kind
        self.bn = KINDS[kind](name="bn")

    def build(self, shape: Any) -> None:
        self.bn.build(shape[1:] if "map" in self.how else shape)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def call(self, x: Any, training: Any = None) -> Any:
        return HOW[self.how](lambda t: self.bn(t, training=training), x)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "how": self.how, "kind": self.kind}


def model_of(how: str, kind: str = "keras") -> Any:
    inputs = keras.Input((5, 3))
    layer: Any = {
        "rnn": lambda: keras.layers.RNN(Cell(kind)),
        "rnn_unrolled": lambda: keras.layers.RNN(Cell(kind), unroll=True),
        "time_distributed": lambda: keras.layers.TimeDistributed(KINDS[kind](name="bn")),
    }.get(how, lambda: Inside(how, kind))()
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(layer(inputs))))
    model.compile("sgd", "mse")
    return model


X, Y = (
    np.random.default_rng(0).normal(1, 2, (8, 5, 3)).astype("float32"),
    np.ones((8, 1), "float32"),
)
CALLS = {  # in one forward pass; Keras's RNN on TensorFlow and PyTorch tries its cell out first
    "rnn": {"jax": 5, "tensorflow": 6, "torch": 6},
    "rnn_unrolled": 5,
    "time_distributed": 5,
    "cond_taken": 1,
    "cond_left": 0,
    "remat": 1,
    "vectorized_map": {"jax": 8, "tensorflow": 1, "torch": 1},  # JAX runs it sample by sample
    "map": {"jax": 8, "tensorflow": 9, "torch": 8},
    "while_loop": 2,
}
TRAINS_ON_JAX = {"rnn_unrolled", "time_distributed"}
"""In the others Keras's own fit fails, with UnexpectedTracerError."""


values = keras.ops.convert_to_numpy


def calls_in(how: str) -> int:
    count: Any = CALLS[how]
    return count[BACKEND] if isinstance(count, dict) else count


def lost(how: str) -> bool:
    return BACKEND == "jax" and how not in TRAINS_ON_JAX


def fails(how: str) -> bool:
    """Whether Keras itself cannot train it."""
    return lost(how) or (BACKEND == "torch" and how == "vectorized_map")


without_gradient = pytest.mark.filterwarnings("ignore:Gradients do not exist")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", CALLS)
def test_what_runs_is_counted_and_not_what_is_traced(how: str, kind: str) -> None:
    model = model_of(how, kind)
    with tn.observe(model) as seen:
        model.predict(X, verbose=0)
    (mode,) = seen.modes.values()
    times = calls_in(how)
    described = [calls.describe() for calls in mode.calls]
    assert described == ([f"{times}× training=False: moving"] if times else [])


@without_gradient
@pytest.mark.parametrize("how", [how for how in CALLS if not fails(how)])
def test_a_training_is_seen(how: str) -> None:
    model = model_of(how)
    with tn.observe(model) as seen:
        model.fit(X, Y, batch_size=8, verbose=0)
    (mode,) = seen.modes.values()
    assert mode.statistics == ("batch" if calls_in(how) else None)
    assert mode.updated == mode.learned == bool(calls_in(how))


@without_gradient
@pytest.mark.parametrize("how", [how for how in CALLS if lost(how) or not fails(how)])
@pytest.mark.parametrize("steps", [1, 2])
def test_statistics_that_jax_loses_are_refused_and_nothing_is_left_behind(
    how: str, steps: int
) -> None:
    model = model_of(how)
    before = [variable.shape for variable in model.variables]
    refusal = r"^JAX loses the statistics of this BatchNormalization.*Remedy: unroll=True at an RNN"
    refused = pytest.raises(tn.ModelError, match=refusal) if lost(how) else nullcontext()
    with refused, tn.observe(model):
        model.fit(X, Y, batch_size=8 // steps, verbose=0)
    assert [values(variable).shape for variable in model.variables] == before
    (mean,) = (variable for variable in model.variables if variable.name == "moving_mean")
    assert values(mean).any() == (not lost(how) and calls_in(how) > 0)
    model.predict(X, verbose=0)
    for variable in model.optimizer.variables:
        values(variable)


@without_gradient
@pytest.mark.parametrize("how", CALLS)
def test_inspect_shows_what_can_be_run_and_why_not_the_rest(how: str) -> None:
    model = model_of(how)
    inspection = tn.inspect(model, X, Y)
    described = {entry: mode.describe() for entry, (mode,) in inspection.modes.items()}
    called = calls_in(how) > 0
    assert {described[e] for e in ("evaluate", "predict", "model(x)")} == {
        "moving" if called else "not called"
    }
    if fails(how):
        reason = "JAX loses the statistics" if lost(how) else "RuntimeError: vmap: "
        assert inspection.not_run["fit"].startswith(reason)
        assert "fit was not run: " in str(inspection)
    else:
        assert described["fit"] == ("batch + updates + learns" if called else "not called")
        assert inspection.not_run == {}
    assert inspection.surprises == ()
    model.predict(X, verbose=0)


def test_a_custom_class_is_judged_by_its_numbers_in_a_loop_too() -> None:
    model = model_of("map", "forced")
    with tn.observe(model) as seen:
        model.fit(X, Y, batch_size=8, verbose=0)
    (mode,) = seen.modes.values()
    assert (mode.statistics, mode.training) == ("moving", (True,))
