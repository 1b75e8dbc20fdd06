"""What do the tools cost, and how does it grow with the model and with the batch?

Run as ``KERAS_BACKEND=jax|tensorflow|torch python benchmarks/tools.py``; ``--help`` shows options.

Stacks of small convolutions (or, with ``--dense``, dense layers), each followed by a
BatchNormalization and a ReLU: ``inspect``, ``fold``, ``place``, ``collect`` and ``diagnose`` of
models of 50, 150 and 500 such layers, then of the smallest on batches of 8 to 256 samples. Each
figure is of the first call in a process of its own, as a user's is: tracing and compiling are in
it, what the process does once and for all (on a model of two layers, before the clock) is not. Time
is the processor's, of all threads together, which other load on the machine distorts least. It and
the growth of the process's largest memory are printed per layer, with the ratio to the smallest
model.

``diagnose`` is also compared with ``predict`` over the same data (the first call, with what it
compiles, and later ones): of models whose moving statistics are the initial ones, about which it
has most to find out, and of recalibrated ones; with ``--resnet``, of ResNet50. And
``truenorm inspect FILE --static`` is compared with a Python that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

TOOLS = ("inspect", "fold", "place", "collect", "diagnose")
LAYERS = (50, 150, 500)
BATCHES = (8, 64, 256)
SIDE, CHANNELS = 8, 8
PICTURE = (64, 64, 3)


def model_of(layers: int, dense: bool) -> Any:
    """So many times a convolution, BatchNormalization and a ReLU; then one dense layer."""
    import keras

    shape = (CHANNELS,) if dense else (SIDE, SIDE, CHANNELS)
    x = inputs = keras.Input(shape)
    for _ in range(layers):
        made = (
            keras.layers.Dense(CHANNELS)
            if dense
            else keras.layers.Conv2D(CHANNELS, 3, padding="same", use_bias=False)
        )
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(made(x)))
    x = x if dense else keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(4, activation="softmax")(x))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def resnet() -> Any:
    """ResNet50 for pictures of 64 x 64, 10 classes."""
    import keras

    model = keras.applications.ResNet50(weights=None, input_shape=PICTURE, classes=10)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def runs(model: Any, x: Any, y: Any, batch: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    import truenorm as tn

    return {
        "inspect": lambda: tn.inspect(model, x[:batch], y[:batch]),
        "fold": lambda: tn.fold(model),
        "place": lambda: tn.place(model, "after_activation"),
        "collect": lambda: tn.collect(model, x, batch_size=batch),
        "diagnose": lambda: tn.diagnose(model, x, y, batch_size=batch),
        "predict": lambda: model.predict(x, batch_size=batch, verbose=0),
    }


def peak() -> int:
    """The most memory of this process since the last :func:`forget`, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget() -> int:
    """Begin to look for the largest memory anew; what it is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def once(given: Any) -> None:
    """Measure one call, in this process, and print seconds and bytes as JSON."""
    import keras
    import numpy as np

    import truenorm as tn

    sys.setrecursionlimit(10**5)  # Keras walks a model's graph by recursion
    keras.utils.set_random_seed(0)
    random, samples = np.random.default_rng(0), given.batch * given.batches

    def drawn(*shape: int) -> tuple[Any, Any, int]:
        x = random.normal(size=(samples, *shape)).astype("float32")
        return x, random.integers(0, 4, samples), given.batch

    shape = (CHANNELS,) if given.dense else (SIDE, SIDE, CHANNELS)
    # What the process does once and for all:
    runs(model_of(2, given.dense), *drawn(*shape))[given.once]()
    model = resnet() if given.resnet else model_of(given.layers, given.dense)
    data = drawn(*(PICTURE if given.resnet else shape))
    if given.recalibrated:
        tn.recalibrate(model, data[0], batch_size=given.batch)
    run = runs(model, *data)[given.once]
    before = forget()
    first = timed(run)
    grown = peak() - before
    print(json.dumps([first, grown, min(timed(run) for _ in range(3)) if given.again else 0.0]))


def timed(run: Callable[[], Any]) -> float:
    """Seconds of the processor that one run takes, of this process or of one that it starts."""
    start = sum(os.times()[:4])
    run()
    return sum(os.times()[:4]) - start


def measured(tool: str, layers: int, given: Any, batch: int, *more: str) -> list[float]:
    """Seconds, bytes and, if wanted, the least seconds of later calls, in a process of its own."""
    command = [sys.executable, __file__, "--once", tool, "--layers", str(layers)]
    command += ["--batch", str(batch), "--batches", str(given.batches)]
    command += [*["--dense"] * given.dense, *more]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def growth_with_layers(given: Any) -> None:
    """Print time and memory per layer."""
    print(f"{'per layer':10}", *(f"{n:>27} layers" for n in given.sizes))
    for tool in given.tools:
        cells, smallest = list[str](), list[float]()
        for layers in given.sizes:
            seconds, grown, _ = measured(tool, layers, given, given.batch)
            each = [1e3 * seconds / layers, grown / 2**20 / layers]
            smallest = smallest or each
            ratio = [a / b if b else 0.0 for a, b in zip(each, smallest, strict=True)]
            cells.append(f"{each[0]:8.1f} ms{ratio[0]:5.2f}  {each[1]:6.2f} MiB{ratio[1]:5.2f}")
        print(f"{tool:10}", *(f"{cell:>34}" for cell in cells), flush=True)


def growth_with_batches(given: Any) -> None:
    """Print time and memory of the smallest model as the batch grows, the number of them equal."""
    print(f"{'per batch':10}", *(f"{n:>26} samples" for n in BATCHES))
    for tool in ("inspect", "collect", "diagnose", "predict"):
        cells: list[str] = []
        for batch in BATCHES:
            seconds, grown, _ = measured(tool, given.sizes[0], given, batch)
            cells.append(f"{1e3 * seconds:9.0f} ms {grown / 2**20:9.1f} MiB")
        print(f"{tool:10}", *(f"{cell:>34}" for cell in cells), flush=True)


def against_predict(given: Any) -> None:
    """Print what diagnose takes, over what predict takes."""
    known = ["--again", *["--resnet"] * given.resnet]
    for layers in given.sizes[: 1 if given.resnet else 2]:
        name = "ResNet50" if given.resnet else f"{layers} layers"
        base, _, least = measured("predict", layers, given, given.batch, *known)
        for statistics in ((), ("--recalibrated",)):
            first, _, later = measured("diagnose", layers, given, given.batch, *known, *statistics)
            print(
                f"diagnose over predict, {name}, {given.batches} batches of {given.batch}"
                f"{', recalibrated' if statistics else ''}: "
                f"first calls {first:.2f} s / {base:.2f} s = {first / base:.1f}, "
                f"later ones {later:.2f} s / {least:.2f} s = {later / least:.1f}",
                flush=True,
            )


def static(rounds: int) -> None:
    """Print what reading a file without Keras takes, over Python's start."""
    from keras.applications import ResNet50

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        ResNet50(weights=None, include_top=False, input_shape=(32, 32, 3)).save(path)
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "inspect --static": [sys.executable, "-m", "truenorm", "inspect", path, "--static"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                quiet = {"check": True, "stdout": subprocess.DEVNULL}
                times[name].append(timed(lambda c=command, q=quiet: subprocess.run(c, **q)))  # noqa: S603
    least = {name: min(taken) for name, taken in times.items()}
    print(", ".join(f"{name} {seconds:.3f} s" for name, seconds in least.items()))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=LAYERS, help="numbers of layers")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--dense", action="store_true", help="dense layers, not convolutions")
    parser.add_argument("--only", choices=("layers", "batches", "predict", "static"))
    parser.add_argument("--once", choices=(*TOOLS, "predict"), help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=50, help=argparse.SUPPRESS)
    parser.add_argument("--resnet", action="store_true", help="ResNet50, with --only predict")
    parser.add_argument("--recalibrated", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        once(given)
        return
    if given.only in (None, "layers"):
        growth_with_layers(given)
    if given.only in (None, "batches"):
        growth_with_batches(given)
    if given.only in (None, "predict"):
        against_predict(given)
    if given.only in (None, "static"):
        static(9)


if __name__ == "__main__":
    main()
