"""Memory after many calls of each tool: ``python tests/torture/leaks.py [CALLS [NAME…]]``.

For the backend that ``KERAS_BACKEND`` names it prints, for each tool and for what a user would do
with Keras alone, how many MiB of the process are in use after a tenth of the calls and after all,
and how much one call added in between.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import truenorm as tn

L = keras.layers
X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
Y = X[:, :1]


def build() -> Any:
    """A small model, compiled and trained for a step."""
    layers = [keras.Input((8,)), L.Dense(16), L.BatchNormalization(), L.ReLU(), L.Dense(1)]
    model: Any = keras.Sequential(layers)
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    return model


def stock_compile_and_fit(model: Any) -> None:
    """Keras alone: compiled anew, a step of training."""
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)


def stock_predict(model: Any) -> None:
    """Keras alone: a prediction by a model that was compiled anew."""
    model.compile("sgd", "mse")
    model.predict(X, verbose=0)


def stock_clone(model: Any) -> None:
    """Keras alone: a copy of the model, run once."""
    keras.models.clone_model(model).predict(X, verbose=0)


def stock_copy(model: Any) -> None:
    """Keras alone: a copy of the model, trained, evaluated and run once."""
    copy: Any = keras.models.clone_model(model)
    copy.compile("sgd", "mse")
    copy.fit(X, Y, verbose=0)
    copy.evaluate(X, Y, verbose=0)
    copy.predict(X, verbose=0)


def stock_function(model: Any) -> None:
    """The framework alone: the model in a function that is compiled anew."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        jax.jit(lambda x: model(x, training=False))(X)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.function(lambda x: model(x, training=False), autograph=False, jit_compile=True)(X)


def collect_and_clear(model: Any) -> None:
    """And what JAX keeps of a program once nothing else does is given back."""
    tn.collect(model, X)
    if keras.config.backend() == "jax":
        import jax

        jax.clear_caches()


def freeze_and_undo(model: Any) -> None:
    """And a step of training with each."""
    frozen = tn.freeze(model)
    model.fit(X, Y, verbose=0)
    frozen.undo()
    model.fit(X, Y, verbose=0)


CALLS: dict[str, Callable[[Any], Any]] = {
    "stock: compile, fit": stock_compile_and_fit,
    "stock: compile, predict": stock_predict,
    "stock: clone, predict": stock_clone,
    "stock: copy, fit, …": stock_copy,
    "stock: compiled function": stock_function,
    "inspect": lambda model: tn.inspect(model, X, Y),
    "freeze, fit, undo, fit": freeze_and_undo,
    "collect": lambda model: tn.collect(model, X),
    "collect, clear_caches": collect_and_clear,
    "recalibrate": lambda model: tn.recalibrate(model, X),
    "diagnose": lambda model: tn.diagnose(model, (X, Y)),
    "replace": lambda model: tn.replace(model, "truenorm"),
    "fold": tn.fold,
    "place": lambda model: tn.place(model, "after_activation"),
}


def in_use() -> float:
    """MiB of memory that the process has to itself."""
    gc.collect()
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(calls: int, names: list[str]) -> None:
    """Print a line for each."""
    print(keras.config.backend(), f"{calls} calls")
    for name in names or CALLS:
        call, model = CALLS[name], build()
        levels: list[float] = []
        for number in range(1, calls + 1):
            call(model)
            if number in (calls // 10, calls):
                levels.append(in_use())
        early, late = levels
        added = (late - early) / (calls - calls // 10)
        print(
            f"{name:26} {early:8.0f} {late:8.0f} MiB {late / early - 1:+7.1%} "
            f"{added:+8.3f} MiB a call",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2:])
