"""Interception is of the thread that opened it: others go on with the same model meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from small_models import snapshot

import truenorm as tn
from truenorm._model.hooks import intercepted, wrapped

L = keras.layers
X = np.random.default_rng(0).normal(3.0, 2.0, (8, 2)).astype("float32")


class Gate(L.Layer):
    """Calls back whenever the model comes by, also while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: Callable[[], None] = lambda: None

    def call(self, x: Any) -> Any:
        self.passed()
        return x


def gated() -> tuple[Any, Gate]:
    gate, layer = Gate(), L.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((2,)), gate, layer, L.Dense(1)])
    layer.moving_mean.assign([3.0, 3.0])
    return model, gate


def in_another_thread(task: Callable[[], Any]) -> Any:
    """What a task gives, run by another thread to its end."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(task()))
    thread.start()
    thread.join()
    return found[0]


def call(model: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(model(X, training=False)))


def test_another_thread_predicts_while_one_collects() -> None:
    model, gate = gated()
    before, expected = snapshot(model), call(model)
    seen: list[np.ndarray] = []

    def passed() -> None:
        gate.passed = lambda: None
        seen.append(in_another_thread(lambda: call(model)))

    gate.passed = passed
    population = tn.collect(model, X, batch_size=8)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-6)
    assert population.sites["bn"].count.tolist() == [8.0, 8.0]
    np.testing.assert_allclose(population.sites["bn"].mean, X.mean(0), rtol=1e-6)
    assert snapshot(model)[3] == before[3]


def test_another_thread_is_not_observed() -> None:
    model, _ = gated()
    with tn.observe(model) as seen:
        model(X)
        in_another_thread(lambda: model(X, training=True))
        model(X)
    (calls,) = seen.modes["bn"].calls
    assert (calls.times, calls.statistics, calls.training) == (2, "moving", None)


def test_two_threads_collect_at_the_same_time() -> None:
    model, gate = gated()
    both = threading.Barrier(2)
    first_time = {False: True, True: True}
    other = X[:6] + 10

    def passed() -> None:
        main = threading.current_thread() is threading.main_thread()
        if first_time[main]:
            first_time[main] = False
            both.wait(60)  # both are inside now, and end in any order

    gate.passed = passed
    found: list[tn.Population] = []
    thread = threading.Thread(target=lambda: found.append(tn.collect(model, other)))
    thread.start()
    own = tn.collect(model, X)
    thread.join()
    np.testing.assert_allclose(own.sites["bn"].mean, X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found[0].sites["bn"].mean, other.mean(0), rtol=1e-6)
    assert "call" not in vars(model.get_layer("bn"))


# --- what is left --------------------------------------------------------------------------------


def test_wrappers_end_in_any_order_and_leave_what_was_there() -> None:
    layer = L.Activation("linear")
    own = layer.call
    layer.__dict__["call"] = own  # somebody's own, on the instance
    said: list[str] = []

    def saying(word: str) -> Any:
        def wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
            said.append(word)
            return original(*args, **kwargs)

        return wrapped([(layer, "call", wrapper)])

    first, second = saying("first"), saying("second")
    first.__enter__()
    second.__enter__()
    layer(X)
    assert said == ["second", "first"]  # the one opened last is outermost
    first.__exit__(None, None, None)
    layer(X)
    assert said == ["second", "first", "second"]
    second.__exit__(None, None, None)
    layer(X)
    assert len(said) == 3
    assert layer.__dict__["call"] is own


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_a_handler_breaks_off(stop: type[BaseException]) -> None:
    model, _ = gated()

    def handler(*_: Any, **__: Any) -> Any:
        raise stop

    layer = model.get_layer("bn")
    with pytest.raises(stop), intercepted([layer], handler):
        layer.call(X)
    assert "call" not in vars(layer)
