"""How fast is one training step of one BatchNormalization on a GPU, with a ReLU and without?

Run as ``KERAS_BACKEND=jax|tensorflow|torch python benchmarks/gpu.py``; ``--help`` shows options.
Exits with code 2 if that backend finds no GPU.

In one process and in turns (A, B, C, A, …): Keras's own layer, truenorm's, and the framework's own
operation (cuDNN's, on PyTorch and TensorFlow; JAX has none); each alone and with a ReLU behind it,
and truenorm's with the ReLU inside (``activation="relu"``). PyTorch runs eagerly (with
``--compile`` by Inductor), JAX jitted, TensorFlow in a graph, and compiled by XLA, which is what
``fit`` does on a GPU. A step is forward
and backward, and all gradients are outputs. Some steps are queued at once and then waited for, as
in ``fit``, where nobody waits after one layer: the time is that of the queue over its length.
Warm-up and compilation come before the clock.

The ratio is that of neighbours in time to Keras's layer (with the ReLU, if there is one), with the
quartiles of all rounds. A fast GPU waits for Python where inputs are small: "GPU ms" is the time
without these gaps, which PyTorch's profiler tells; with JAX and TensorFlow take inputs so large
(``--shape``) that twice the size takes twice as long. GB/s are those of the 8T (T: bytes of x) that
a step without a further pass over the data moves, whatever it really moves, in the time of the GPU
where that is known; "of copy" is that over the GB/s of a copy on the same device (2T; of the
numbers with their signs changed, which no compiler leaves out). Beside them: the largest error
against float64, relative to the largest magnitude, of the output and of dx, for the same inputs.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import keras
import numpy as np
from layer import Step, error, policy, reference

import truenorm as tn

SHAPES = (
    (64, 56, 56, 64),
    (64, 28, 28, 256),
    (64, 14, 14, 1024),
    (64, 7, 7, 2048),
    (16, 112, 112, 64),
    (65536, 512),
)
NEAR_ZERO = 0.01  # Outputs within it may be on either side of the kink of ReLU.


def gpu() -> str | None:
    """The name of the GPU that the backend computes on, None if there is none."""
    backend = keras.config.backend()
    if backend == "torch":
        from torch import cuda

        return cuda.get_device_name() if cuda.is_available() else None
    if backend == "jax":
        import jax

        device = jax.devices()[0]
        return device.device_kind if device.platform == "gpu" else None
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    details: Any = tf.config.experimental.get_device_details
    return details(found[0]).get("device_name", found[0].name) if found else None


def wait(results: Any) -> None:
    """Until the device has done all that was asked of it."""
    backend = keras.config.backend()
    if backend == "torch":
        from torch import cuda

        if cuda.is_available():
            cuda.synchronize()
    elif backend == "jax":
        import jax

        jax.block_until_ready(results)
    else:
        import tensorflow as tf

        tf.test.experimental.sync_devices()


def layers(dtype: str) -> dict[str, tuple[Any, ...]]:
    """What is measured on every backend, as layers one behind the other."""
    kind = policy(dtype)

    def relu() -> Any:
        return keras.layers.ReLU(dtype=kind)

    return {
        "keras": (keras.layers.BatchNormalization(dtype=kind),),
        "truenorm": (tn.BatchNormalization(dtype=kind),),
        "keras, relu": (keras.layers.BatchNormalization(dtype=kind), relu()),
        "truenorm, relu": (tn.BatchNormalization(dtype=kind), relu()),
        "truenorm(relu)": (tn.BatchNormalization(activation="relu", dtype=kind),),
    }


def through(chain: tuple[Any, ...], x: Any) -> Any:
    """The output of layers one behind the other."""
    y = chain[0](x, training=True)
    for behind in chain[1:]:
        y = behind(y)
    return y


def torch_steps(x: Any, dy: Any, dtype: str, compiled: bool = False) -> dict[str, Step]:
    """Steps on PyTorch, eager or by ``torch.compile``."""
    import torch
    from torch.nn import functional

    x.requires_grad_()
    if compiled:
        torch.compiler.reset()  # It compiles one function so many times only.

    def step(forward: Callable[[Any], Any], *weights: Any) -> Step:
        if compiled:
            forward = torch.compile(forward, dynamic=False)

        def run() -> tuple[Any, ...]:
            y = forward(x)
            return (y, *torch.autograd.grad(y, (x, *weights), dy))

        return run

    def of(chain: tuple[Any, ...]) -> Step:
        layer = chain[0]
        layer.build(x.shape)
        return step(partial(through, chain), layer.gamma.value, layer.beta.value)

    ones, zeros = (make(x.shape[-1], device=x.device) for make in (torch.ones, torch.zeros))
    mean, variance = zeros.clone(), ones.clone()
    gamma, beta = ones.requires_grad_(), zeros.requires_grad_()

    def native(behind: Callable[[Any], Any] | None = None) -> Step:
        def forward(x: Any) -> Any:
            # Of rank 4, the view is what PyTorch calls channels_last.
            view = x.movedim(-1, 1)
            y = functional.batch_norm(view, mean, variance, gamma, beta, True, 0.01, 1e-3)
            return (y if behind is None else behind(y)).movedim(1, -1)

        return step(forward, gamma, beta)

    steps = {name: of(chain) for name, chain in layers(dtype).items()}
    return {**steps, "native": native(), "native, relu": native(torch.relu)}


def jax_steps(x: Any, dy: Any, dtype: str) -> dict[str, Step]:
    """Steps on JAX, jitted."""
    import jax

    def of(layer: Any, *behind: Any) -> Step:
        layer.build(x.shape)
        trainable = [v.value for v in layer.trainable_variables]
        moving = [v.value for v in layer.non_trainable_variables]

        @jax.jit
        def run(trainable: Any, moving: Any, x: Any, dy: Any) -> tuple[Any, ...]:
            def forward(trainable: Any, x: Any) -> Any:
                y, moved = layer.stateless_call(trainable, moving, x, training=True)
                for another in behind:
                    y = another(y)
                return y, moved

            y, pull, moved = jax.vjp(forward, trainable, x, has_aux=True)
            (dgamma, dbeta), dx = pull(dy)
            return y, dx, dgamma, dbeta, moved

        return lambda: run(trainable, moving, x, dy)

    return {name: of(*chain) for name, chain in layers(dtype).items()}


def tensorflow_steps(x: Any, dy: Any, dtype: str) -> dict[str, Step]:
    """Steps on TensorFlow: in a graph, and compiled by XLA."""
    import tensorflow as tf

    ones, zeros, empty = tf.ones(x.shape[-1]), tf.zeros(x.shape[-1]), tf.zeros(0)

    def of(forward: Callable[[Any], Any], parameters: Any, xla: bool) -> Step:
        def run(x: Any, dy: Any) -> tuple[Any, ...]:
            with tf.GradientTape() as tape:
                tape.watch((x, *parameters))
                y = forward(x)
            return (y, *tape.gradient(y, (x, *parameters), output_gradients=dy))

        compiled: Any = tf.function(run, jit_compile=xla or None)
        return lambda: compiled(x, dy)

    def native(x: Any) -> Any:
        rows = x if len(x.shape) == 4 else tf.reshape(x, (x.shape[0], 1, 1, x.shape[-1]))
        y, *_ = tf.raw_ops.FusedBatchNormV3(
            x=rows, scale=ones, offset=zeros, mean=empty, variance=empty, epsilon=1e-3
        )
        return tf.reshape(y, x.shape)

    def rectified(x: Any) -> Any:
        return tf.nn.relu(native(x))

    steps: dict[str, Step] = {}
    for end, xla in (("", False), (" XLA", True)):
        for name, chain in layers(dtype).items():
            chain[0].build(x.shape)
            parameters = (chain[0].gamma.value, chain[0].beta.value)
            steps[name + end] = of(partial(through, chain), parameters, xla)
        steps["native" + end] = of(native, (ones, zeros), xla)
        steps["native, relu" + end] = of(rectified, (ones, zeros), xla)
    return steps


def seconds(step: Callable[[], Any], queue: int) -> float:
    """Of one step, when so many are asked for at once."""
    start = time.perf_counter()
    results = None
    for _ in range(queue):
        results = step()
    wait(results)
    return (time.perf_counter() - start) / queue


def busy(step: Step, queue: int) -> float | None:
    """Seconds for which a GPU worked on one step, the gaps aside; None where nobody can tell."""
    if keras.config.backend() != "torch":
        return None
    from torch import cuda
    from torch.profiler import ProfilerActivity, profile

    if not cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds(step, queue)
    kernels = [e for e in seen.key_averages() if e.device_type.name == "CUDA"]
    return sum(kernel.self_device_time_total for kernel in kernels) / queue / 1e6 or None


def working(steps: Mapping[str, Step], queue: int) -> dict[str, Step]:
    """The steps that run, warm; the others with what the framework says of them."""
    works: dict[str, Step] = {}
    for name, step in steps.items():
        try:
            seconds(step, queue)
            seconds(step, queue)
        except Exception as error:  # A device may lack an operation: that costs its line only.
            print(f"  {name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        else:
            works[name] = step
    return works


def measure(
    shape: tuple[int, ...], dtype: str, rounds: int, queue: int, compiled: bool = False
) -> None:
    """Print the table of one shape and dtype."""
    ops: Any = keras.ops
    random = np.random.default_rng(0)
    drawn = (random.normal(0.5, 1.5, shape), random.normal(size=shape))
    # The reference gets what the dtype makes of the numbers, as all others do.
    x, dy = (ops.convert_to_numpy(ops.cast(ops.cast(a, dtype), "float32")) for a in drawn)
    y = reference.forward(x).output
    dy = np.where(np.abs(y) < NEAR_ZERO, 0, dy)
    truth = {
        False: (y, reference.backward(dy, x).x),
        True: (np.maximum(y, 0), reference.backward(dy * (y > 0), x).x),
    }
    tx, tdy = (ops.cast(ops.convert_to_tensor(a), dtype) for a in (x, dy))
    size = ops.convert_to_numpy(tdy).nbytes
    print(f"{shape} {dtype}, T = {size / 1e6:.1f} MB")
    of_torch = partial(torch_steps, compiled=compiled)
    builders = {"jax": jax_steps, "tensorflow": tensorflow_steps, "torch": of_torch}
    steps = builders[keras.config.backend()](tx, tdy, dtype)
    steps = working({"copy": lambda: (ops.negative(tdy),), **steps}, queue)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, queue))
    on_gpu = {name: busy(step, queue) for name, step in steps.items()}
    speed = {
        name: (2 if name == "copy" else 8) * size / (on_gpu[name] or statistics.median(taken)) / 1e9
        for name, taken in times.items()
    }
    heading = ("ms [quartiles]", "keras / it [quartiles]", "GPU ms", "GB/s", "of copy", "err y")
    print(row("", *heading, "err dx"))
    for name, step in steps.items():
        relu, end = "relu" in name, " XLA" if name.endswith("XLA") else ""
        baseline = times.get(("keras, relu" if relu else "keras") + end, [])
        ratios = [a / b for a, b in zip(baseline, times[name], strict=False)]
        took = on_gpu[name]
        results = step()[: 0 if name == "copy" else 2]
        errors = [error(a, b) for a, b in zip(results, truth[relu], strict=False)]
        print(
            row(
                name,
                quartiles([1e3 * t for t in times[name]], 3),
                quartiles(ratios, 2) if ratios and errors else "",
                "" if took is None else f"{1e3 * took:.3f}",
                f"{speed[name]:.0f}",
                f"{speed[name] / speed['copy']:.0%}",
                *(f"{e:.1e}" for e in errors),
            )
        )


def row(name: str, *columns: str) -> str:
    """One line of the table."""
    widths = (22, 23, 7, 6, 8, 8, 8)
    return f"  {name:18} " + " ".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=False))


def quartiles(values: list[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--queue", type=int, default=10, help="steps that are asked for at once")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shape", help="one shape, as numbers with commas; default: a set")
    parser.add_argument("--compile", action="store_true", help="PyTorch: by torch.compile")
    parser.add_argument("--cpu", action="store_true", help="go on without a GPU, to try this out")
    given = parser.parse_args()
    backend, device = keras.config.backend(), gpu()
    if given.compile and backend != "torch":
        parser.error("--compile is PyTorch's: set KERAS_BACKEND=torch")
    if device is None and not given.cpu:
        parser.exit(2, f"{backend} finds no GPU here: nothing is measured\n")
    print(f"{backend} {importlib.import_module(backend).__version__}, {device or 'no GPU'}")
    shapes = SHAPES
    if given.shape:
        shapes = (tuple(int(n) for n in given.shape.split(",")),)
    for shape in shapes:
        for dtype in given.dtype:
            measure(shape, dtype, given.rounds, given.queue, given.compile)


if __name__ == "__main__":
    main()
