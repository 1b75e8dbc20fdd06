"""A tiny study that is to be killed: ``python under_fire.py FOLDER SEEDS WORKERS``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

POSITIONS = ("before_activation", "after_activation")


def build() -> Any:
    import keras

    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data(seed: int) -> Any:
    import numpy as np

    if Path(os.environ.get("UNDER_FIRE_HANG", "-")).exists():
        time.sleep(600)
    x = np.random.default_rng(seed).normal(size=(48, 3)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    return (x[:32], y[:32]), (x[32:], y[32:])


def run(folder: Path, *, seeds: int = 1, workers: int = 1) -> Any:
    """The study, from its beginning or from where it was stopped."""
    from truenorm import study

    return study(
        build,
        data,
        positions=POSITIONS,
        seeds=seeds,
        epochs=2,
        batch_size=8,
        directory=folder,
        workers=workers,
        on_event=lambda e: print(e.kind, e.pid, flush=True),
    )


def facts(result: Any) -> list[Any]:
    """What must not depend on what happened on the way."""
    return [(t.position, t.seed, t.error, t.start, t.history, t.final) for t in result.trials]


if __name__ == "__main__":
    run(Path(sys.argv[1]), seeds=int(sys.argv[2]), workers=int(sys.argv[3]))
