"""What a study costs beside the training: per trial, with two workers, and with a thousand.

    KERAS_BACKEND=torch python benchmarks/study.py

1. Overhead of a trial: its whole time in a process of its own, less imports, less training.
   And the same as CPU time of one process, which depends less on what else runs.
2. Efficiency of two workers: the trials' time with one, over twice the time with two.
3. A simulation of many workers with one driver, by the constants measured in 1 and 2: what a
   driver does per trial is done one at a time, and that limits it first.
"""

from __future__ import annotations

import heapq
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import truenorm as tn
from truenorm._study.folder import read_result, write_result
from truenorm._study.pool import Progress
from truenorm._study.settings import specs_of


def build() -> Any:
    """A dense network that trains for some seconds."""
    import keras

    model = keras.Sequential(
        [
            keras.Input((30,)),
            keras.layers.Dense(64),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data() -> Any:
    """Numbers without meaning."""
    x = np.random.default_rng(0).normal(size=(4096, 30)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    return (x[:3072], y[:3072]), (x[3072:], y[3072:])


def timed(workers: int, seeds: int, epochs: int) -> tuple[float, tn.Study, list[float]]:
    """A study's wall time, its record, and the time from each start to its first epoch's end."""
    begun: dict[tuple[str, int], float] = {}
    lasted: list[float] = []

    def watch(event: Progress) -> None:
        key = (event.position, event.seed)
        if event.kind == "started":
            begun[key] = time.perf_counter()
        elif event.kind == "finished":
            lasted.append(time.perf_counter() - begun[key])

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = tn.study(
            build,
            data(),
            positions=("none", "before_activation"),
            seeds=seeds,
            epochs=epochs,
            workers=workers,
            directory=folder,
            on_event=watch,
        )
        wall = time.perf_counter() - start
        assert all(t.error is None for t in result.trials)
    return wall, result, lasted


def imports() -> float:
    """Median time of a process that only imports what a trial imports."""
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import truenorm._study.trial"], check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


TRIAL = """
import sys, time
from pathlib import Path
from truenorm._study import trial
imports = time.process_time()
trial.main(Path(sys.argv[1]))
print("\\ncpu", imports, time.process_time() - imports)
"""


def cpu_seconds() -> tuple[float, float]:
    """CPU time of a trial's imports, and of the rest with one epoch; medians of three."""
    with tempfile.TemporaryDirectory() as folder:
        tn.study(
            build, data(), positions=("none", "before_activation"), seeds=1, epochs=1,
            workers=1, directory=folder,
        )  # fmt: skip
        (spec,) = Path(folder).glob("trials/before_activation-seed0.spec.json")
        found: list[list[float]] = []
        for _ in range(3):
            ran = subprocess.run(  # noqa: S603 - our own module
                [sys.executable, "-c", TRIAL, spec], check=True, capture_output=True, text=True
            )
            found.append(list(map(float, ran.stdout.splitlines()[-1].split()[1:])))
    imports, rest = map(statistics.median, zip(*found, strict=True))
    return imports, rest


def driver_seconds() -> float:
    """What the driver does for one trial: write its result, read it again."""
    _, result, _ = timed(1, 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "trials").mkdir()
        spec = specs_of(result.settings, keep_models=False)[0]
        start = time.perf_counter()
        for _ in range(50):
            write_result(path, spec, result.trials[0])
            assert read_result(path, spec) is not None
        return (time.perf_counter() - start) / 50


def simulated(workers: int, trials: int, training: float, start: float, serial: float) -> float:
    """Wall time of a study on many workers, where the driver serves one result at a time."""
    free = [0.0] * workers
    ends: list[float] = []
    for _ in range(trials):
        begin = heapq.heappop(free)
        end = begin + start + training
        heapq.heappush(free, end)
        ends.append(end)
    driver = 0.0
    for end in sorted(ends):
        driver = max(driver, end) + serial
    return driver


def main() -> None:
    """Print the three parts."""
    bare = imports()
    short, _, lasted_short = timed(1, 2, 1)
    one, _, lasted = timed(1, 2, 31)
    # The same trial with 30 epochs more: what the epochs do not explain is overhead.
    epoch = (statistics.median(lasted) - statistics.median(lasted_short)) / 30
    overhead = statistics.median(lasted) - 31 * epoch - bare
    print(f"imports {bare:.2f} s, one epoch {epoch:.3f} s, overhead {overhead:.2f} s per trial")
    of_imports, of_the_rest = cpu_seconds()
    print(f"CPU time: imports {of_imports:.2f} s, the rest with one epoch {of_the_rest:.2f} s")
    two, _, _ = timed(2, 2, 31)
    print(f"one worker {one:.1f} s, two {two:.1f} s: {one / (2 * two):.2f} of ideal")
    print(f"(studies of one epoch: {short:.1f} s)")
    serial = driver_seconds()
    print(f"driver: {1000 * serial:.1f} ms per trial")
    for training in (10.0, 60.0, 600.0):
        trials = 10_000
        wall = simulated(1000, trials, training, bare + overhead, serial)
        ideal = trials * training / 1000
        busy = trials * serial / wall
        print(
            f"1,000 workers, {trials} trials of {training:.0f} s: {wall:.0f} s, {ideal / wall:.2f} "
            f"of ideal; the driver is busy {busy:.0%}"
        )


if __name__ == "__main__":
    main()
