"""What does folding gain, and what does the position of BatchNormalization cost in inference?

Run as ``KERAS_BACKEND=jax|tensorflow|torch python benchmarks/fold.py``; ``--help`` shows options.
Architectures of Keras with random weights and trained-like statistics, on random images. In one
process and in turns (A, B, C, A, …), after a warm-up that compiles, ``predict`` of

- *model*: the architecture as it is,
- *folded*: what ``truenorm.fold`` makes of it,
- *without*: the same architecture that never had a BatchNormalization (``place(…, "none")``), which
  is what a perfect folding could reach,
- *behind*: with BatchNormalization behind its activations (``place(…, "after_activation")``), and
- *behind, folded*: what ``fold`` makes of that.

Ratios are those of neighbours in time: the median of all rounds and the quartiles. Beside them: how
many layers and BatchNormalization each has, the size of its file, and the largest difference of the
outputs that ``fold`` measured, relative to the largest output. With ``--stays`` instead: what a
BatchNormalization that cannot be folded costs against Keras's other layers that can scale and
shift.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import truenorm as tn

SIZES = {
    "ResNet50": 96,
    "InceptionV3": 128,
    "Xception": 96,
    "MobileNetV2": 96,
    "EfficientNetB0": 96,
}


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, round by round."""
    for run in runs.values():  # compiles
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(over: list[float], under: list[float]) -> str:
    """Median and quartiles of the paired ratios."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def predicting(model: Any, x: np.ndarray) -> Callable[[], Any]:
    """Inference on one batch."""
    return lambda: model.predict(x, batch_size=len(x), verbose=0)


def trained_like(model: Any) -> Any:
    """Statistics, gamma and beta that are not those of a new layer."""
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for weight in layer.weights:
                drawn = random.uniform(-0.25, 0.25, weight.shape)
                positive = weight.name in ("gamma", "moving_variance")
                weight.assign(2**drawn if positive else drawn)
    return model


def size_of(model: Any) -> str:
    """Layers, BatchNormalization among them, and bytes of its file."""
    kinds = [isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        megabytes = path.stat().st_size / 2**20
    return f"{len(kinds):4d} layers, {sum(kinds):3d} BatchNormalization, {megabytes:6.1f} MiB"


def measure(name: str, batch: int, rounds: int) -> None:
    """Print all figures of one architecture."""
    keras.utils.set_random_seed(0)
    shape = (SIZES[name], SIZES[name], 3)
    build = getattr(keras.applications, name)
    model = trained_like(build(weights=None, include_top=False, input_shape=shape, pooling="avg"))
    behind = tn.place(model, "after_activation").model
    folded, behind_folded = tn.fold(model), tn.fold(behind)
    models = {
        "model": model,
        "folded": folded.model,
        "without": tn.place(model, "none").model,
        "behind": behind,
        "behind, folded": behind_folded.model,
    }
    print(f"{name}, {batch} images of {shape}")
    for kind, each in models.items():
        print(f"  {kind:15s} {size_of(each)}")
    print(
        f"  outputs of folded models: within {folded.max_rel_error:.1e}, "
        f"behind the activation {behind_folded.max_rel_error:.1e}"
    )
    x = np.random.default_rng(0).normal(size=(batch, *shape)).astype("float32")
    runs = {kind: predicting(each, x) for kind, each in models.items()}
    times = in_turns(runs, rounds)
    print("  milliseconds  " + ", ".join(f"{k} {1e3 * min(v):.1f}" for k, v in times.items()))
    for what, over, under in (
        ("folded over without", "folded", "without"),
        ("model over folded", "model", "folded"),
        ("behind over behind, folded", "behind", "behind, folded"),
        ("behind, folded over folded", "behind, folded", "folded"),
    ):
        print(f"  {what:28s} {ratio(times[over], times[under])}")


def what_stays(rounds: int) -> None:
    """Print what a scale and a shift per channel cost, as each layer of Keras's that can do so."""
    layers = keras.layers
    for shape in ((56, 56, 64), (14, 14, 512)):
        x = np.random.default_rng(0).normal(size=(16, *shape)).astype("float32")
        numbers = np.linspace(0.5, 2.0, shape[-1])
        kinds = {
            "BatchNormalization": layers.BatchNormalization(),
            "the same, as scale and shift": layers.BatchNormalization(epsilon=0.0),
            "Rescaling": layers.Rescaling(numbers.tolist(), numbers.tolist()),
            "Normalization": layers.Normalization(mean=numbers, variance=numbers),
            "DepthwiseConv2D 1x1": layers.DepthwiseConv2D(1),
            "nothing": layers.Identity(),
        }
        inputs = keras.Input(shape)
        runs: dict[str, Callable[[], Any]] = {}
        for kind, layer in kinds.items():
            # Between two cheap operations, as in a model, where a compiler may join them.
            model = keras.Model(inputs, layers.ReLU()(layer(layers.ReLU()(inputs))))
            runs[kind] = predicting(model, x)
        times = in_turns(runs, rounds)
        print(f"16 x {shape}, over the model without such a layer")
        for kind in kinds:
            print(f"  {kind:29s} {ratio(times[kind], times['nothing'])}")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--stays", action="store_true")
    given = parser.parse_args()
    print(f"{keras.config.backend()}, {os.cpu_count()} processors")
    if given.stays:
        what_stays(given.rounds)
        return
    for name in given.models:
        measure(name, given.batch, given.rounds)


if __name__ == "__main__":
    main()
