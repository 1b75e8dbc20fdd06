"""What does collecting exact statistics cost, against ``predict`` over the same data?

Run as ``KERAS_BACKEND=jax|tensorflow|torch python benchmarks/collecting.py``; ``--help`` shows
options. ResNet50 with random weights on random images, in one process: ``predict`` and ``collect``
take turns, after a warm-up of each that compiles. The ratio is that of neighbours in time. Beside
it: the largest error of the first layer's statistics against float64 in one shot; how the memory in
use grew from the shortest to a four times longer run; and, with ``--population``, how many passes
the settled statistics took and how far inference then is from them.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import truenorm as tn
from truenorm._statistics.collect import Collection, runner_of


def seconds(run: Callable[[], Any]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_layer_error(model: Any, x: np.ndarray, found: tn.Population) -> tuple[float, float]:
    """Of the mean in standard deviations and of the variance relative to it."""
    layer = next(k for k in model.layers if isinstance(k, keras.layers.BatchNormalization))
    before = keras.Model(model.inputs, layer.input)
    seen = np.float64(before.predict(x, batch_size=len(x), verbose=0))
    moments = found.sites[layer.name]
    mean, variance = seen.mean((0, 1, 2)), seen.var((0, 1, 2))
    shift = np.abs(moments.mean - mean) / np.sqrt(variance)
    return float(shift.max()), float(np.abs(moments.variance / variance - 1).max())


def megabytes() -> float:
    """The most memory that this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--population", action="store_true")
    given = parser.parse_args()
    keras.utils.set_random_seed(0)
    shape = (given.size, given.size, 3)
    model = keras.applications.ResNet50(weights=None, include_top=False, input_shape=shape)
    random = np.random.default_rng(0)
    x = random.normal(size=(given.batch * given.batches, *shape)).astype("float32")
    print(f"{keras.config.backend()}, ResNet50, {given.batches} batches of {given.batch}, {shape}")

    def predict() -> None:
        model.predict(x, batch_size=given.batch, verbose=0)

    runner = runner_of(model)  # as one compiled predict: compiled before the clock

    def collect() -> tn.Population:
        return Collection(runner, x, batch_size=given.batch).population()

    first = seconds(collect)
    seconds(predict)
    ratios: list[float] = []
    for _ in range(given.pairs):
        base = seconds(predict)
        ratios.append(seconds(collect) / base)
    print(
        f"  collect takes {statistics.median(ratios):.2f} times predict (from {min(ratios):.2f} to "
        f"{max(ratios):.2f} in {len(ratios)} pairs); the first, which compiles, took {first:.1f} s"
    )
    found = collect()
    mean, variance = first_layer_error(model, x, found)
    print(f"  first layer against float64: mean {mean:.1e} std, variance {variance:.1e}")
    assert mean < 1e-5
    assert variance < 1e-5
    before = megabytes()
    tn.collect(model, [x[: given.batch]] * (4 * given.batches), batch_size=given.batch)
    print(f"  memory: {before:.0f} MB; four times the batches added {megabytes() - before:.0f}")
    if given.population:
        done = tn.recalibrate(model, x, upstream="population", batch_size=given.batch)
        seen = tn.collect(model, x, upstream="moving", batch_size=given.batch)
        worst = 0.0
        for path, moments in seen.sites.items():
            held = done.population.sites[path]
            shift = np.abs(moments.mean - held.mean) / held.standard_deviation
            scale = np.abs(moments.variance / held.variance - 1)
            worst = max(worst, shift.max(), scale.max())
        print(
            f"  population: {done.population.passes} passes for {len(seen.sites)} layers; "
            f"collected again in inference: within {worst:.1e}"
        )


if __name__ == "__main__":
    main()
