"""How long does one training step of one BatchNormalization take, and how right is it?

Run as ``KERAS_BACKEND=jax|tensorflow|torch python benchmarks/layer.py``; ``--help`` shows options.

Layers and functions take turns in one process (A, B, C, A, B, C, …): Keras's own layer as users
get it (jit on JAX, graph on TensorFlow, eager on PyTorch), truenorm's, the same with the composite
kernel (which a fast path must beat), and the framework's own operation. A step is forward and
backward; the gradients of x, gamma and beta are outputs, so no compiler can drop them. Warm-up and
compilation come before the clock. The ratio is that of neighbours in time, with the quartiles of
all pairs; the least times are what a busy machine distorts least. Beside each timing: the largest
error against float64, relative to the largest magnitude, of the output and of dx.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import truenorm as tn
from truenorm import kernels
from truenorm.kernels import _composite
from truenorm.kernels import _reference as reference

SHAPES = (
    (32, 56, 56, 64),
    (32, 28, 28, 256),
    (32, 14, 14, 1024),
    (8192, 512),
    (32, 4, 4, 64),
    (64, 128, 100),
)
Step = Callable[[], tuple[Any, ...]]


def torch_steps(x: np.ndarray, dy: np.ndarray, dtype: str) -> dict[str, Step]:
    """Steps on PyTorch, eager."""
    import torch
    from torch.nn import functional

    kind = getattr(torch, dtype)
    tx, tdy = (torch.from_numpy(a).to(kind) for a in (x, dy))
    tx.requires_grad_()
    channels = x.shape[-1]

    def of(layer: Any) -> Step:
        layer.build(x.shape)

        def step() -> tuple[Any, ...]:
            y = layer(tx, training=True)
            parameters = (tx, layer.gamma.value, layer.beta.value)
            return (y, *torch.autograd.grad(y, parameters, tdy))

        return step

    gamma, beta = torch.ones(channels), torch.zeros(channels)
    mean, variance = torch.zeros(channels), torch.ones(channels)
    gamma.requires_grad_()
    beta.requires_grad_()

    def native() -> tuple[Any, ...]:
        last = x.ndim - 1
        view = tx.permute(0, last, *range(1, last)) if last > 1 else tx
        y = functional.batch_norm(view, mean, variance, gamma, beta, True, 0.01, 1e-3)
        y = y.permute(0, *range(2, last + 1), 1) if last > 1 else y
        return (y, *torch.autograd.grad(y, (tx, gamma, beta), tdy))

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    return {
        "keras": of(stock(dtype)),
        "truenorm": of(ours(dtype)),
        "composite": composite(of(ours(dtype))),
        "native": native,
    }


def jax_steps(x: np.ndarray, dy: np.ndarray, dtype: str) -> dict[str, Step]:
    """Steps on JAX, jitted."""
    import jax

    kx, kdy = (jax.numpy.asarray(a, dtype) for a in (x, dy))

    def of(layer: Any) -> Step:
        layer.build(x.shape)
        trainable = [v.value for v in layer.trainable_variables]
        moving = [v.value for v in layer.non_trainable_variables]

        @jax.jit
        def run(trainable: Any, moving: Any, x: Any, dy: Any) -> tuple[Any, ...]:
            def forward(trainable: Any, x: Any) -> Any:
                return layer.stateless_call(trainable, moving, x, training=True)

            y, pull, moving = jax.vjp(forward, trainable, x, has_aux=True)
            (dgamma, dbeta), dx = pull(dy)
            return y, dx, dgamma, dbeta, moving

        return lambda: jax.block_until_ready(run(trainable, moving, kx, kdy))

    print(f"jax {jax.__version__}, {os.cpu_count()} threads")
    return {
        "keras": of(stock(dtype)),
        "truenorm": of(ours(dtype)),
        "composite": composite(of(ours(dtype))),
    }


def tensorflow_steps(x: np.ndarray, dy: np.ndarray, dtype: str) -> dict[str, Step]:
    """Steps on TensorFlow, in a graph: plain, and compiled by XLA (``fit``'s default)."""
    import tensorflow as tf

    kx, kdy = (tf.cast(tf.constant(a), dtype) for a in (x, dy))

    def of(layer: Any, *, xla: bool = False) -> Step:
        layer.build(x.shape)

        @tf.function(jit_compile=xla or None)
        def run(x: Any, dy: Any) -> tuple[Any, ...]:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            parameters = (x, layer.gamma.value, layer.beta.value)
            return (y, *tape.gradient(y, parameters, output_gradients=dy))

        return lambda: blocked(run(kx, kdy))

    channels = x.shape[-1]
    gamma, beta = tf.ones(channels), tf.zeros(channels)
    empty = tf.zeros(0)

    @tf.function
    def fused(x: Any, dy: Any) -> tuple[Any, ...]:
        rows = tf.reshape(x, (x.shape[0], -1, 1, channels))
        with tf.GradientTape() as tape:
            tape.watch((rows, gamma, beta))
            y, *_ = tf.raw_ops.FusedBatchNormV3(
                x=rows, scale=gamma, offset=beta, mean=empty, variance=empty, epsilon=1e-3
            )
        dx, dgamma, dbeta = tape.gradient(
            y, (rows, gamma, beta), output_gradients=tf.reshape(dy, rows.shape)
        )
        return tf.reshape(y, x.shape), tf.reshape(dx, x.shape), dgamma, dbeta

    print(f"tensorflow {tf.__version__}, {os.cpu_count()} threads")
    return {
        "keras": of(stock(dtype)),
        "truenorm": of(ours(dtype)),
        "composite": composite(of(ours(dtype))),
        "native": lambda: blocked(fused(kx, kdy)),
        "keras XLA": of(stock(dtype), xla=True),
        "truenorm XLA": of(ours(dtype), xla=True),
        "composite XLA": composite(of(ours(dtype), xla=True)),
    }


def blocked(results: tuple[Any, ...]) -> tuple[Any, ...]:
    """TensorFlow on a CPU is done when a graph returns; on a device the copy of a number waits."""
    float(results[1][(0,) * len(results[1].shape)])
    return results


def stock(dtype: str) -> Any:
    """Keras's layer under the mixed policy of a half dtype, or that dtype's own."""
    return keras.layers.BatchNormalization(dtype=policy(dtype))


def ours(dtype: str) -> Any:
    """Truenorm's layer under the same policy."""
    return tn.BatchNormalization(dtype=policy(dtype))


def composite(step: Step) -> Step:
    """The step with the composite kernel, whatever the backend."""

    def patched() -> tuple[Any, ...]:
        with mock.patch.object(kernels, "normalize", _composite.normalize):
            return step()

    return patched


def policy(dtype: str) -> str:
    """The dtype policy under which a layer takes inputs of this dtype."""
    return f"mixed_{dtype}" if dtype in ("float16", "bfloat16") else dtype


def median_time(repeat: int, step: Callable[[], Any]) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def error(result: Any, truth: np.ndarray) -> float:
    """Largest error relative to the largest magnitude."""
    values = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(result, "float32")), np.float64)
    return float(np.abs(values - truth).max() / np.abs(truth).max())


def measure(shape: tuple[int, ...], dtype: str, pairs: int) -> None:
    """Print the table of one shape."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 1.5, shape).astype("float32")
    dy = rng.normal(size=shape).astype("float32")
    truth_y = reference.forward(x).output
    truth_dx = reference.backward(dy, x).x
    builders = {"jax": jax_steps, "tensorflow": tensorflow_steps, "torch": torch_steps}
    steps = builders[keras.config.backend()](x, dy, dtype)
    target = np.empty_like(x)
    memcpy = median_time(9, lambda: np.copyto(target, x))
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(pairs):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    print(f"{shape} {dtype}: memcpy {1e3 * memcpy:.2f} ms")
    heading = ("median ms", "least ms", "keras / it [quartiles]", "err y", "err dx")
    print(f"  {'':12}", *(f"{h:>{w}}" for h, w in zip(heading, (10, 9, 26, 9, 9), strict=True)))
    for name, step in steps.items():
        y, dx, *_ = step()
        baseline = times["keras XLA" if name.endswith("XLA") else "keras"]
        ratios = [a / b for a, b in zip(baseline, times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"  {name:13} {1e3 * statistics.median(times[name]):10.2f}"
            f" {1e3 * min(times[name]):9.2f}"
            f" {f'{middle:.2f} [{low:.2f}, {high:.2f}]':>26}"
            f" {error(y, truth_y):9.1e} {error(dx, truth_dx):9.1e}"
        )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", help="one shape, as numbers with commas; default: a set")
    arguments = parser.parse_args()
    shapes = SHAPES
    if arguments.shape:
        shapes = (tuple(int(n) for n in arguments.shape.split(",")),)
    for shape in shapes:
        measure(shape, arguments.dtype, arguments.pairs)


if __name__ == "__main__":
    main()
