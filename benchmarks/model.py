"""What does BatchNormalization cost in one training step of a whole model?

Run as ``KERAS_BACKEND=jax|tensorflow|torch python benchmarks/model.py``; ``--help`` shows options.
ResNet50 with random weights, on one batch of random images, in one process and in turns (A, B, C,
A, …), after a warm-up that compiles:

- *stock*: the architecture as Keras has it,
- *truenorm*: the same with truenorm's layers (``replace``),
- *fused*: the same with the ReLU that follows a BatchNormalization, and the sum of a residual block
  between the two, inside the layer (``replace(fuse=True)``), and
- *without*: the same without BatchNormalization (``place(…, "none")``).

A step is ``train_on_batch``, which is what ``fit`` runs: compiled on JAX and TensorFlow, eager on
PyTorch (with ``--compile`` by Inductor there, and by XLA on TensorFlow). It ends when a weight that
it has changed is read. The overhead is a step's time less that of *without* in the same round: the
median of all rounds and the quartiles. Beside the times: the loss of the first step, the same for
the first three but for rounding; and on PyTorch, where it is eager, the memory that is kept for the
backward pass and, on a GPU, how far the memory in use rises in a step.

``--monitor`` measures something else: epochs of ``fit`` with and without ``callbacks.Monitor`` at
its default setting, in turns. Each step is compared with the same step of the epoch without, round
by round; the median of these differences, summed over an epoch's steps, is what the monitor costs.
(A whole epoch's time has the worst moment of a busy machine in it.) Beside it the processor time
that is spent inside the callback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from fold import in_turns

import truenorm as tn

CLASSES = 10
LOSSES_WITHIN = 0.05  # What 16 bits make of 50 layers; float32 stays within 1e-4.
Step = Callable[[], float]


def candidates(size: int) -> dict[str, Any]:
    """The models, with the same weights."""
    shape = (size, size, 3)
    build: Any = keras.applications.ResNet50
    stock = build(weights=None, classes=CLASSES, input_shape=shape)
    return {
        "stock": stock,
        "truenorm": tn.replace(stock).model,
        "fused": tn.replace(stock, fuse=True).model,
        "without": tn.place(stock, "none").model,
    }


def training(model: Any, x: np.ndarray, y: np.ndarray, jit_compile: bool | str) -> Step:
    """A step that learns next to nothing, so that no step differs from the others."""
    optimizer = keras.optimizers.SGD(1e-9)
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit_compile)

    def step() -> float:
        loss = model.train_on_batch(x, y)
        keras.ops.convert_to_numpy(model.trainable_variables[-1].value)  # Wait: it comes last.
        return float(loss)

    return step


def kept(model: Any, step: Step) -> float:
    """Megabytes that PyTorch's autograd keeps from forward to backward, weights aside."""
    from torch.autograd.graph import saved_tensors_hooks

    weights = {variable.value.data_ptr() for variable in model.variables}
    sizes: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()  # Once, however many operations keep it.
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(sizes.values()) / 2**20


def peak(step: Step) -> float | None:
    """Megabytes of a GPU in use at the peak of a PyTorch step, beyond those before it."""
    from torch import cuda

    if not cuda.is_available():
        return None
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    step()
    return (cuda.max_memory_allocated() - before) / 2**20


def quartiles(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def share(name: str, overheads: dict[str, float]) -> str:
    """One overhead over that of stock."""
    stock = overheads["stock"]
    return f"{overheads[name] / stock:.2f}" if stock > 0 else "no figure (stock has no overhead)"


def table(models: dict[str, Any], steps: dict[str, Step], rounds: int) -> None:
    """Measure, and print all figures."""
    losses = {name: step() for name, step in steps.items()}
    times = {
        name: [1e3 * seconds for seconds in taken]
        for name, taken in in_turns(steps, rounds).items()
    }
    over = {
        name: [a - b for a, b in zip(taken, times["without"], strict=True)]
        for name, taken in times.items()
    }
    eager = keras.config.backend() == "torch" and not models["stock"].jit_compile
    print(
        f"{'':10}  median ms  least ms  over without, ms [quartiles]       loss  kept MB  peak MB"
    )
    keeping: dict[str, float] = {}
    for name, step in steps.items():
        taken = times[name]
        megabytes = (kept(models[name], step), peak(step)) if eager else (None, None)
        keeping[name] = megabytes[0] or 0.0
        columns = (f"{'-' if m is None else f'{m:.0f}':>8}" for m in megabytes)
        print(
            f"{name:10} {statistics.median(taken):10.1f} {min(taken):9.1f}"
            f" {quartiles(over[name]):>29} {losses[name]:10.6f}",
            *columns,
        )
    middle = {name: statistics.median(differences) for name, differences in over.items()}
    least = {name: min(taken) - min(times["without"]) for name, taken in times.items()}
    if eager:
        print(f"kept by fused over what stock keeps: {keeping['fused'] / keeping['stock']:.2f}")
    for name in ("truenorm", "fused"):
        print(f"overhead of {name} over that of stock: {share(name, middle)}", end="")
        print(f", by least times {share(name, least)}")
    assert np.isfinite(list(losses.values())).all()
    same = np.allclose([losses["truenorm"], losses["fused"]], losses["stock"], rtol=LOSSES_WITHIN)
    assert same, "other losses (so it is where a batch has very few values per channel)"


class Timed(tn.callbacks.Monitor):
    """Adds up the processor time of its own hooks, which other programs do not lengthen."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, float] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("on_"):
            return found

        def hook(*args: Any, **kwargs: Any) -> None:
            start = time.thread_time()
            found(*args, **kwargs)
            self.spent[name] = self.spent.get(name, 0.0) + time.thread_time() - start

        return hook


class Clock(keras.callbacks.Callback):
    """Listed last: the seconds from one step's begin to the next, and to the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """From here on."""
        self._before = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """The step before has ended, and been looked at."""
        now = time.perf_counter()
        self.steps.append(now - self._before)
        self._before = now

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Nothing; but for a callback that has this, Keras on JAX waits until the step ends."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Of an epoch with all that is done at its end."""
        self.on_train_batch_begin(0)


class Repeated(keras.utils.PyDataset):
    """One batch, as many times as an epoch has steps."""

    def __init__(self, batch: tuple[np.ndarray, np.ndarray], steps: int) -> None:
        super().__init__()
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.batch


def monitored(model: Any, data: Repeated, rounds: int) -> None:
    """Epochs with and without the monitor, in turns."""
    runs: dict[bool, list[list[float]]] = {False: [], True: []}
    inside: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        for watched in (False, True):
            clock, timed = Clock(), Timed()
            callbacks = [timed, clock] if watched else [clock]
            model.fit(data, callbacks=callbacks, verbose=0)
            runs[watched].append(clock.steps)
            inside += [timed.spent] if watched else []
    without, with_it = (np.array(runs[watched][1:]) for watched in (False, True))  # after warm-up
    step = float(np.median(without))
    cost = float(np.median(with_it - without, axis=0).sum())
    spent = inside[1:]
    begin = statistics.median(one.pop("on_train_begin") for one in spent)
    hooks = statistics.median(sum(one.values()) for one in spent)
    print(f"a step {1e3 * step:.1f} ms, {rounds} epochs of {data.steps} steps with and without")
    print(f"with the monitor an epoch is longer by {1e3 * cost:.1f} ms (median, step by step)")
    print(f"processor time inside the monitor {1e3 * hooks:.1f} ms", end="")
    print(f", and {1e3 * begin:.1f} ms when fit begins")
    for length in (20, 100, 1000):
        share = max(cost, hooks) / (length * step)
        print(f"the larger of the two is {share:.2%} of an epoch of {length} steps")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--monitor", action="store_true", help="what callbacks.Monitor costs")
    parser.add_argument("--steps", type=int, default=20, help="steps per epoch, with --monitor")
    parser.add_argument("--compile", action="store_true", help="jit_compile=True on all backends")
    parser.add_argument("--dtype", default="float32", help="dtype policy, as mixed_bfloat16")
    given = parser.parse_args()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(given.dtype)
    random = np.random.default_rng(0)
    x = random.normal(size=(given.batch, given.size, given.size, 3)).astype("float32")
    y = random.integers(0, CLASSES, given.batch)
    if given.monitor:
        build: Any = keras.applications.ResNet50
        model = build(weights=None, classes=CLASSES, input_shape=x.shape[1:])
        model.compile(keras.optimizers.SGD(1e-9), "sparse_categorical_crossentropy")
        monitored(model, Repeated((x, y), given.steps), given.rounds)
        return
    models = candidates(given.size)
    jit_compile = given.compile or "auto"
    steps = {name: training(model, x, y, jit_compile) for name, model in models.items()}
    framework = importlib.import_module(keras.config.backend())
    threads = getattr(framework, "get_num_threads", os.cpu_count)()
    print(
        f"{framework.__name__} {framework.__version__}, Keras {keras.__version__}, {threads}"
        f" threads, jit_compile={models['stock'].jit_compile}: ResNet50, {x.shape}, {given.dtype}"
    )
    table(models, steps, given.rounds)


if __name__ == "__main__":
    main()
