"""How long does one step of one BatchNormalization take, how right is it, and what does it keep?

Run as ``KERAS_BACKEND=jax|tensorflow|torch python benchmarks/layer.py``; ``--help`` shows options.

Layers and functions take turns in one process, in another order each round, since each finds the
memory as the one before left it: Keras's own layer as users get it (jit on JAX, graph on
TensorFlow, eager on PyTorch), truenorm's, the same with the composite kernel (which a fast path
must beat) and without the compiled passes, and the framework's own operation. A step is forward and
backward; the gradients of x, gamma and beta are outputs, so no compiler can drop them. With
``--relu`` a ReLU follows (in truenorm's layer as ``activation="relu"``), with ``--inference`` a
step is the output in inference mode; with ``--mask`` 7 of 10 rows count, with ``--ghosts 8`` each 8
samples have statistics of their own in truenorm's layer (Keras's has no such thing, and is measured
without), with ``--renorm`` both layers correct the batch's statistics toward moving ones (which
stay what they were, so that there is a truth). With ``--compile`` all that PyTorch runs is compiled
by ``torch.compile`` (Inductor, which needs a C++ compiler), and the number of graphs that this
makes is printed: more than one is a break in the graph. Warm-up and compilation come before the
clock. The ratio is that of neighbours in time, with the quartiles of all pairs; the least times are
what a busy machine distorts least; the last line is the geometric mean of the ratios over the
inputs that are not small. Beside each timing: the largest error against float64, relative to the
largest magnitude, of the output and of dx; and what is kept for the backward pass, in units of the
input's bytes, where the framework tells (PyTorch and JAX).
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import truenorm as tn
from truenorm import _kernels as kernels
from truenorm._kernels import composite, reference

SHAPES = (
    (32, 56, 56, 64),
    (32, 28, 28, 256),
    (32, 14, 14, 1024),
    (8192, 512),
    (64, 7, 7, 2048),
    (16, 112, 112, 64),
    (32, 28, 28, 96),
    (128, 1000),
)
CHANNELS_FIRST = (32, 64, 56, 56)
SMALL = ((32, 4, 4, 64), (64, 128, 100))  # not in the mean: the call itself is what takes the time
CHOOSING = {"torch": "torch.passes", "jax": "jax.native", "tensorflow": "tensorflow.native"}
COMPILED = importlib.import_module(f"truenorm._kernels.{CHOOSING[keras.config.backend()]}")
INSTEAD: dict[str, tuple[Any, str, Any]] = {
    "composite": (kernels, "normalize", composite.normalize),
    "uncompiled": (COMPILED, "takes", lambda *_: False),
}
Step = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Task:
    """One input, its channel axis, and what a step is."""

    x: np.ndarray
    dy: np.ndarray
    axis: int
    dtype: str
    relu: bool
    inference: bool
    mask: np.ndarray | None = None
    ghosts: int | None = None
    compiled: bool = False
    renorm: bool = False

    def layers(self) -> dict[str, Any]:
        """Keras's layer, and truenorm's for its kernel and for those instead of it; built."""
        options: dict[str, Any] = {"axis": self.axis, "dtype": policy(self.dtype)}
        options |= {"renorm": True, "renorm_momentum": 1.0} if self.renorm else {}
        ours: dict[str, Any] = options | {"activation": "relu" if self.relu else None}
        ours["virtual_batch_size"] = self.ghosts
        found: dict[str, Any] = {
            "keras": keras.layers.BatchNormalization(**options),
            "truenorm": tn.BatchNormalization(**ours),
        }
        if not (self.inference or self.ghosts or self.compiled):
            found |= {name: tn.BatchNormalization(**ours) for name in INSTEAD}
        for layer in found.values():
            layer.build(self.x.shape)
        return found

    def run(self, layer: Any, x: Any) -> Any:
        """Its output on x, in the mode of this task."""
        mask = None if self.mask is None else keras.ops.convert_to_tensor(self.mask)
        y = layer(x, training=not self.inference, mask=mask)
        return keras.ops.relu(y) if self.relu and not hasattr(layer, "activation") else y

    def truth(self) -> tuple[np.ndarray, ...]:
        """Output and dx in float64, of a new layer."""
        if self.inference:
            y = self.x / np.sqrt(1.0 + 1e-3, dtype="float64")
            return (np.maximum(y, 0) if self.relu else y,)
        groups = max(1, len(self.x) // self.ghosts) if self.ghosts else 1
        y, dx = np.empty_like(self.x, "float64"), np.empty_like(self.x, "float64")
        for part in (slice(k, None, groups) for k in range(groups)):
            how: dict[str, Any] = {"axis": self.axis}
            how["mask"] = None if self.mask is None else self.mask[part]
            gamma, beta = None, None
            if self.renorm:  # toward a mean of 0 and a deviation of 1
                batch = reference.forward(self.x[part], **how)
                gamma, beta = np.sqrt(batch.variance + 1e-3), batch.mean
            y[part] = reference.forward(self.x[part], gamma, beta, **how).output
            dy = np.where(y[part] > 0, self.dy[part], 0) if self.relu else self.dy[part]
            dx[part] = reference.backward(dy, self.x[part], gamma, **how).x
        return (np.maximum(y, 0) if self.relu else y), dx


def torch_steps(task: Task) -> tuple[dict[str, Step], dict[str, float]]:
    """Steps on PyTorch, eager or compiled; and what autograd keeps."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.nn import functional

    kind = getattr(torch, task.dtype)
    tx, tdy = (torch.from_numpy(a).to(kind) for a in (task.x, task.dy))
    tx.requires_grad_(not task.inference)
    channels, rank = task.x.shape[task.axis], task.x.ndim
    steps: dict[str, Step] = {}
    kept: dict[str, float] = {}

    def add(name: str, call: Callable[[], Any], parameters: Sequence[Any]) -> None:
        if task.compiled:
            torch.compiler.reset()
            graphs = torch._dynamo.explain(call)().graph_count
            print(f"{name}: {graphs} graph{'s' * (graphs != 1)}")
            call = torch.compile(call, dynamic=False)

        def step() -> tuple[Any, ...]:
            if task.inference:
                with torch.no_grad():
                    return (call(),)
            y = call()
            return (y, *torch.autograd.grad(y, (tx, *parameters), tdy))

        steps[name] = with_kernel(name, step)
        seen: dict[int, int] = {}

        def count(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            _y = call()  # alive, so that no address is used twice
        kept[name] = sum(seen.values()) / (tx.numel() * tx.element_size())

    for name, layer in task.layers().items():
        weights = (layer.gamma.value, layer.beta.value)
        add(name, partial(task.run, layer, tx), weights)

    gamma, beta = torch.ones(channels), torch.zeros(channels)
    mean, variance = torch.zeros(channels), torch.ones(channels)
    gamma.requires_grad_()
    beta.requires_grad_()
    last = rank - 1 if task.axis % rank == rank - 1 else 1

    def native() -> Any:
        view = tx.permute(0, last, *range(1, last)) if last > 1 else tx
        y = functional.batch_norm(view, mean, variance, gamma, beta, not task.inference, 0.01, 1e-3)
        y = functional.relu(y, inplace=True) if task.relu else y
        return y.permute(0, *range(2, last + 1), 1) if last > 1 else y

    if not (task.ghosts or task.renorm or task.mask is not None):
        add("native", native, (gamma, beta))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    return steps, {} if task.inference else kept


def jax_steps(task: Task) -> tuple[dict[str, Step], dict[str, float]]:
    """Steps on JAX, jitted; and what the backward pass closes over."""
    import jax

    kx, kdy = (jax.numpy.asarray(a, task.dtype) for a in (task.x, task.dy))
    steps: dict[str, Step] = {}
    kept: dict[str, float] = {}
    for name, layer in task.layers().items():
        trainable = [v.value for v in layer.trainable_variables]
        moving = [v.value for v in layer.non_trainable_variables]

        def forward(trainable: Any, moving: Any, x: Any, layer: Any = layer) -> Any:
            mapping = zip(layer.variables, [*trainable, *moving], strict=True)
            with keras.StatelessScope(state_mapping=list(mapping)) as scope:
                y = task.run(layer, x)
            return y, [scope.get_current_value(v) for v in layer.non_trainable_variables]

        def train(trainable: Any, moving: Any, x: Any, dy: Any, forward: Any = forward) -> Any:
            y, pull, moved = jax.vjp(
                lambda weights, x: forward(weights, moving, x), trainable, x, has_aux=True
            )
            (dgamma, dbeta), dx = pull(dy)
            return y, dx, dgamma, dbeta, moved

        def predict(trainable: Any, moving: Any, x: Any, dy: Any, forward: Any = forward) -> Any:
            del dy
            return (forward(trainable, moving, x)[0],)

        program = jax.jit(predict if task.inference else train)
        step = partial(waited, program, trainable, moving, kx, kdy)
        steps[name] = with_kernel(name, step)
        if not task.inference:
            pull = jax.jit(
                lambda w, x, f=forward, m=moving: jax.vjp(lambda w, x: f(w, m, x)[0], w, x)[1]
            )
            leaves = jax.tree.leaves(pull(trainable, kx))
            kept[name] = sum(leaf.nbytes for leaf in leaves) / kx.nbytes
    print(f"jax {jax.__version__}, {os.cpu_count()} threads")
    return steps, kept


def waited(program: Any, *arguments: Any) -> tuple[Any, ...]:
    """The results of a JAX program, once they are there."""
    import jax

    return jax.block_until_ready(program(*arguments))


def tensorflow_steps(task: Task) -> tuple[dict[str, Step], dict[str, float]]:
    """Steps on TensorFlow, in a graph: plain, and compiled by XLA."""
    import tensorflow as tf

    kx, kdy = (tf.cast(tf.constant(a), task.dtype) for a in (task.x, task.dy))

    def of(call: Callable[[Any], Any], weights: Sequence[Any], *, xla: bool = False) -> Step:
        def run(x: Any, dy: Any) -> tuple[Any, ...]:
            if task.inference:
                return (call(x),)
            with tf.GradientTape() as tape:
                tape.watch((x, *weights))
                y = call(x)
            return (y, *tape.gradient(y, (x, *weights), output_gradients=dy))

        graph: Any = tf.function(run, jit_compile=xla or None)
        return lambda: blocked(graph(kx, kdy))

    channels = task.x.shape[task.axis]
    gamma, beta = tf.ones(channels), tf.zeros(channels)
    mean, variance = (
        (tf.zeros(channels), tf.ones(channels)) if task.inference else [tf.zeros(0)] * 2
    )

    def fused(x: Any) -> Any:
        first = task.axis % task.x.ndim == 1 and task.x.ndim == 4  # not on a CPU: transposed
        x = tf.transpose(x, (0, 2, 3, 1)) if first else x
        y, *_ = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, (x.shape[0], -1, 1, channels)),
            scale=gamma,
            offset=beta,
            mean=mean,
            variance=variance,
            epsilon=1e-3,
            is_training=not task.inference,
        )
        y = tf.reshape(tf.nn.relu(y) if task.relu else y, x.shape)
        return tf.transpose(y, (0, 3, 1, 2)) if first else y

    steps: dict[str, Step] = {}
    for name, layer in task.layers().items():
        weights = (layer.gamma.value, layer.beta.value)
        for suffix, xla in (("", False), (" XLA", True)):
            step = of(partial(task.run, layer), weights, xla=xla)
            steps[name + suffix] = with_kernel(name, step)
    if not (task.ghosts or task.renorm or task.mask is not None):
        steps["native"] = of(fused, (gamma, beta))
    print(f"tensorflow {tf.__version__}, {os.cpu_count()} threads")
    return steps, {}


def blocked(results: tuple[Any, ...]) -> tuple[Any, ...]:
    """TensorFlow on a CPU is done when a graph returns; on a device the copy of a number waits."""
    float(results[-1][(0,) * len(results[-1].shape)])
    return results


def with_kernel(name: str, step: Step) -> Step:
    """The step, with another kernel if this is the name of one."""
    if name not in INSTEAD:
        return step

    module, attribute, other = INSTEAD[name]
    own = getattr(module, attribute)

    def patched() -> tuple[Any, ...]:
        setattr(module, attribute, other)  # mock's patch takes longer than a small step
        try:
            return step()
        finally:
            setattr(module, attribute, own)

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


def measure(task: Task, pairs: int, only: Sequence[str] | None = None) -> dict[str, float]:
    """Print the table of one input; the median ratios."""
    builders = {"jax": jax_steps, "tensorflow": tensorflow_steps, "torch": torch_steps}
    steps, kept = builders[keras.config.backend()](task)
    kept_back = {*(only or steps), "keras", "keras XLA"}
    steps = {name: step for name, step in steps.items() if name in kept_back}
    truth, target = task.truth(), np.empty_like(task.x)
    memcpy = median_time(9, lambda: np.copyto(target, task.x))
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffled = random.Random(0)  # noqa: S311
    for _ in range(pairs):
        for name in shuffled.sample(sorted(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    print(f"{task.x.shape}, axis {task.axis}, {task.dtype}: memcpy {1e3 * memcpy:.2f} ms")
    heading = ("median ms", "least ms", "keras / it [quartiles]", "err y", "err dx", "kept")
    print(f"  {'':12}", *(f"{h:>{w}}" for h, w in zip(heading, (10, 9, 26, 9, 9, 6), strict=True)))
    found: dict[str, float] = {}
    for name, step in steps.items():
        baseline = times["keras XLA" if name.endswith("XLA") else "keras"]
        ratios = [a / b for a, b in zip(baseline, times[name], strict=True)]
        low, found[name], high = statistics.quantiles(ratios, n=4)
        errors = [f"{error(a, b):.1e}" for a, b in zip(step(), truth, strict=False)]
        errors += ["-"] * (2 - len(errors))
        print(
            f"  {name:13} {1e3 * statistics.median(times[name]):10.2f}"
            f" {1e3 * min(times[name]):9.2f}"
            f" {f'{found[name]:.2f} [{low:.2f}, {high:.2f}]':>26}"
            f" {errors[0]:>9} {errors[1]:>9}"
            f" {f'{kept[name]:.2f}' if name in kept else '-':>6}"
        )
    return found


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="one after the other")
    parser.add_argument("--relu", action="store_true", help="with a ReLU behind it")
    parser.add_argument("--inference", action="store_true", help="inference mode, no gradients")
    parser.add_argument("--mask", action="store_true", help="a mask, where channels are last")
    parser.add_argument("--ghosts", type=int, help="samples of a ghost batch")
    parser.add_argument("--renorm", action="store_true", help="batch renormalization")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--shape", help="one shape, as numbers with commas; default: a set")
    parser.add_argument("--only", nargs="+", help="these candidates, with their baselines")
    parser.add_argument("--axis", type=int, default=-1, help="the channel axis of that shape")
    given = parser.parse_args()
    if given.compile and keras.config.backend() != "torch":
        parser.error("--compile is PyTorch's: set KERAS_BACKEND=torch")
    inputs = [*((shape, -1) for shape in SHAPES), (CHANNELS_FIRST, 1)]
    inputs += [(shape, -1) for shape in SMALL]
    if given.mask:
        inputs = [(shape, axis) for shape, axis in inputs if axis == -1]
    if given.shape:
        inputs = [(tuple(int(n) for n in given.shape.split(",")), given.axis)]
    for dtype in given.dtype:
        all_of(inputs, dtype, given)


def all_of(inputs: Sequence[tuple[tuple[int, ...], int]], dtype: str, given: Any) -> None:
    """Print the tables of one dtype, and the means over them."""
    found: dict[str, list[float]] = {}
    for shape, axis in inputs:
        rng = np.random.default_rng(0)
        x = rng.normal(0.5, 1.5, shape).astype("float32")
        dy = rng.normal(size=shape).astype("float32")
        mask = rng.random(shape[:-1]) < 0.7 if given.mask else None
        how = (given.relu, given.inference, mask, given.ghosts, given.compile, given.renorm)
        task = Task(x, dy, axis, dtype, *how)
        for name, ratio in measure(task, given.pairs, given.only).items():
            if given.shape or shape not in SMALL:
                found.setdefault(name, []).append(ratio)
    means = (f"{name} {statistics.geometric_mean(ratios):.2f}" for name, ratios in found.items())
    print("keras / it, geometric mean: " + ", ".join(means))


if __name__ == "__main__":
    main()
