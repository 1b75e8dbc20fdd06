"""What does ``synchronized=True`` cost in a step, and what would it on many devices?

Run as ``KERAS_BACKEND=jax|tensorflow|torch python benchmarks/sync.py``; ``--help`` shows options.

**Measured**: one step of one layer, forward and backward, on 1, 2 and 4 replicas of this machine,
each with a batch of its own: processes of ``torch.distributed`` (gloo over loopback), devices of a
``MirroredStrategy``, devices of a mesh under ``jax.jit``. *alone* has each replica normalise by
itself, *synchronized* all together, *keras* is Keras's own ``synchronized=True`` (TensorFlow only).
(Under ``jax.jit`` a batch is that of all devices in any case; there *alone* is a ``shard_map``, and
*shard_map* and *pmap* are the synchronized layer in a program that is mapped over the devices.)
All take turns in one process, after a warm-up that compiles; on PyTorch all processes meet before
each step, outside the clock. The ratio to *alone* is that of neighbours in time, with the quartiles
of all pairs. Beside it: the largest error of the first replica's output against float64 for the
batch of all, relative to its largest value; for *alone*: how far that is from the batch of all.
Replicas share the cores here: with more of them than cores *alone* gets slower as well.

**On paper**: a step of ResNet50's 53 layers. For R replicas on M machines NCCL reckons, for its
low-latency protocol, with a ring and a tree (``src/graph/tuning.cc``):

    all-gather:  base + (R - M) intra + (M - 1) inter            + (R - 1) bytes / bandwidth
    all-reduce:  base + 2 (R / M - 1) intra + 2 log2(M) inter    + 2 bytes / bandwidth

Forward each layer gathers 2 C + 2 numbers of 8 bytes, backward it sums 2 C of 4. Machines have 8
replicas, joined by NVLink; machines are joined by Ethernet. In the line *gloo, loopback* (PyTorch)
all constants are what gloo needs between two processes here, each a machine.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import keras
import numpy as np

import truenorm as tn
from truenorm._kernels import reference

MOST = 4
SHAPES = ((16, 28, 28, 128), (16, 7, 7, 1024))  # of one replica
RESNET50 = (
    [64] + [64, 64, 256] * 3 + [256] + [128, 128, 512] * 4 + [512] + [256, 256, 1024] * 6 + [1024]
    + [512, 512, 2048] * 3 + [2048]
)  # fmt: skip
"""Channels of its 53 layers."""

Step = Callable[[], Any]
"""One step; the first replica's output, or that of all."""


@dataclass(frozen=True)
class Network:
    """Seconds of a message, and bytes per second."""

    name: str
    base: tuple[float, float]  # of an all-gather, an all-reduce
    intra: tuple[float, float]  # of one hop inside a machine
    inter: tuple[float, float]  # of one hop between machines
    bandwidth: tuple[float, float]  # inside a machine, between machines
    replicas: int = 8  # of a machine

    def seconds(self, replicas: int, channels: int) -> tuple[float, float]:
        """Of the message forward and the one backward."""
        machines = math.ceil(replicas / self.replicas)
        each = replicas // machines
        rate = self.bandwidth[machines > 1]
        gather = (replicas - machines) * self.intra[0] + (machines - 1) * self.inter[0]
        reduce = 2 * (each - 1) * self.intra[1] + 2 * math.log2(machines) * self.inter[1]
        return (
            self.base[0] + gather + (replicas - 1) * 8 * (2 * channels + 2) / rate,
            self.base[1] + reduce + 2 * 4 * 2 * channels / rate,
        )


DOCUMENTED = Network(
    "NVLink, 100 Gb/s Ethernet",
    (3.6e-6, 4.4e-6), (0.47e-6, 0.52e-6), (2.7e-6, 5.0e-6),  # NCCL, src/graph/tuning.cc: LL
    (450e9, 12.5e9),  # NVLink 4, one direction (NVIDIA H100 datasheet); IEEE 802.3ba
)  # fmt: skip


def batches(shape: tuple[int, ...], replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and gradients of all replicas."""
    random = np.random.default_rng(0)
    whole = (replicas * shape[0], *shape[1:])
    offsets = np.repeat(random.normal(size=replicas), shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x, gradient = random.normal(size=(2, *whole))
    return (x + offsets).astype("float32"), gradient.astype("float32")


def layers(shape: tuple[int, ...]) -> dict[str, Any]:
    """Built; Keras's own where it has one."""
    synchronized = tn.BatchNormalization(synchronized=True)
    made: dict[str, Any] = {"alone": tn.BatchNormalization(), "synchronized": synchronized}
    if keras.config.backend() == "tensorflow":
        made["keras"] = keras.layers.BatchNormalization(synchronized=True)
    for layer in made.values():
        layer.build(shape)
    return made


def on_torch(shape: tuple[int, ...], replicas: int) -> dict[str, Step]:
    """Of this process."""
    import torch
    from torch import distributed

    rank = distributed.get_rank()
    own = slice(rank * shape[0], (rank + 1) * shape[0])
    x, gradient = (torch.tensor(part[own]) for part in batches(shape, replicas))
    x.requires_grad_()

    def step(layer: Any) -> Any:
        y = layer(x, training=True)
        torch.autograd.grad(y, (x, layer.gamma.value, layer.beta.value), gradient)
        return y.detach().numpy()

    return {name: lambda layer=layer: step(layer) for name, layer in layers(shape).items()}


@cache
def mirrored(replicas: int) -> Any:
    """One for all: two of the same devices would take each other's messages."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([f"CPU:{k}" for k in range(replicas)])


def on_tensorflow(shape: tuple[int, ...], replicas: int) -> dict[str, Step]:
    """Under the strategy of so many devices."""
    import tensorflow as tf

    strategy = mirrored(replicas)
    parts = [np.split(part, replicas) for part in batches(shape, replicas)]
    given = strategy.experimental_distribute_values_from_function(
        lambda at: tuple(tf.constant(part[at.replica_id_in_sync_group]) for part in parts)
    )
    with strategy.scope():
        made = layers(shape)

    def step(layer: Any) -> Step:
        def one(x: Any, gradient: Any) -> Any:
            weights = [layer.gamma.value, layer.beta.value]
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return y, *tape.gradient(y, [x, *weights], gradient)

        graph = tf.function(lambda given: strategy.run(one, given))

        def run() -> Any:
            y, *gradients = graph(given)
            strategy.experimental_local_results(gradients[0])[0].numpy()  # wait
            return strategy.experimental_local_results(y)[0].numpy()

        return run

    return {name: step(layer) for name, layer in made.items()}


def on_jax(shape: tuple[int, ...], replicas: int) -> dict[str, Step]:
    """Over a mesh of its own."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    devices = jax.devices()[:replicas]
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    spread, same = PartitionSpec("batch"), PartitionSpec()
    every = NamedSharding(mesh, spread)
    whole = jax.device_put(batches(shape, replicas), every)
    stacked = jax.device_put([a.reshape(replicas, *shape) for a in batches(shape, replicas)], every)

    def step(layer: Any, how: str) -> Step:
        moving = [v.value for v in layer.non_trainable_variables]

        def one(x: Any, weights: Any, gradient: Any) -> Any:
            def call(x: Any, weights: Any) -> Any:
                return layer.stateless_call(weights, moving, x, training=True)[0]

            y, pull = jax.vjp(call, x, weights)
            return y, pull(gradient)

        weights = [
            jax.device_put(v.value, NamedSharding(mesh, same)) for v in layer.trainable_variables
        ]
        if how == "shard_map":
            one = jax.shard_map(
                one, mesh=mesh, in_specs=(spread, same, spread),
                out_specs=(spread, (spread, spread)), check_vma=False,
            )  # fmt: skip
        pmap = partial(jax.pmap, axis_name="batch", in_axes=(0, None, 0), devices=devices)
        program: Any = (pmap if how == "pmap" else jax.jit)(one)
        x, gradient = stacked if how == "pmap" else whole

        def run() -> Any:
            y, _ = jax.block_until_ready(program(x, weights, gradient))
            return np.asarray(y).reshape(-1, *shape[1:])

        return run

    made = layers(shape)
    ways = ("shard_map", "pmap") if replicas > 1 else ()
    return {
        "alone": step(made["alone"], "shard_map"),
        "synchronized": step(made["synchronized"], "jit"),
        **{how: step(made["synchronized"], how) for how in ways},
    }


def in_turns(
    steps: dict[str, Step], rounds: int, meet: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of every step, round by round."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for count in range(-2, rounds):  # two to compile and warm up
        for name, step in steps.items():
            meet()
            start = time.perf_counter()
            step()
            if count >= 0:
                taken[name].append(time.perf_counter() - start)
    return taken


def table(
    shape: tuple[int, ...],
    replicas: int,
    rounds: int,
    meet: Callable[[], None] = lambda: None,
    rank: int = 0,
) -> list[str]:
    """Measure; a line for each."""
    make = {"torch": on_torch, "tensorflow": on_tensorflow, "jax": on_jax}[keras.config.backend()]
    steps = make(shape, replicas)
    taken = in_turns(steps, rounds, meet)
    truth = reference.forward(batches(shape, replicas)[0]).output
    lines: list[str] = []
    for name, step in steps.items():
        meet()
        output = step()
        wanted = truth[rank * shape[0] :][: len(output)]
        error = np.abs(output - wanted).max() / np.abs(wanted).max()
        assert name == "alone" or error < 1e-5, (name, error)
        pairs = [a / b for a, b in zip(taken[name], taken["alone"], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        lines.append(
            f"{shape!s:>20} {replicas:8} {name:>13} {1e3 * statistics.median(taken[name]):10.2f} "
            f"{1e3 * min(taken[name]):9.2f}   {middle:5.2f} [{low:.2f}, {high:.2f}]   {error:.0e}"
        )
    return lines


def work(rank: int, replicas: int, port: str, rounds: int) -> None:
    """One process of PyTorch; the first one prints."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", address, rank=rank, world_size=replicas)
    for shape in SHAPES:
        lines = table(shape, replicas, rounds, distributed.barrier, rank)
        if rank == 0:
            print("\n".join(lines), flush=True)
    if replicas == 2:
        found = loopback(rounds)
        if rank == 0:
            print(" ".join(["constants", *map(str, found)]), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def loopback(rounds: int) -> tuple[float, float, float]:
    """Seconds of the smallest gather and sum, and bytes per second of a large gather."""
    import torch
    from torch import distributed

    def seconds(size: int, gather: bool) -> float:
        own = torch.zeros(size, dtype=torch.float64)
        parts = [torch.empty_like(own) for _ in range(2)]

        def message() -> None:
            distributed.all_gather(parts, own) if gather else distributed.all_reduce(own)

        taken = in_turns({"message": message}, 3 * rounds, distributed.barrier)
        return statistics.median(taken["message"])

    large = 2**20
    gather, total = seconds(1, gather=True), seconds(1, gather=False)
    return gather, total, 8 * large / (seconds(large, gather=True) - gather)


def processes(replicas: int, rounds: int) -> tuple[float, ...]:
    """Start so many, print what the first says, and leave none behind; the constants."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "--rounds", str(rounds), "--worker"]
    started = [
        subprocess.Popen(  # noqa: S603
            [*command, str(rank), str(replicas), port], stdout=subprocess.PIPE, text=True
        )
        for rank in range(replicas)
    ]
    try:
        said = started[0].communicate(timeout=240)[0].splitlines()
        assert [process.wait(timeout=60) for process in started] == [0] * replicas
    finally:
        for process in started:
            process.kill()
    constants = [line.split()[1:] for line in said if line.startswith("constants")]
    print("\n".join(line for line in said if not line.startswith("constants")), flush=True)
    return tuple(float(one) for one in constants[0]) if constants else ()


def on_paper(networks: list[Network]) -> None:
    """A step of ResNet50 with 8 to 1,024 replicas."""
    layers, numbers = len(RESNET50), sum(4 * channels + 2 for channels in RESNET50)
    print(f"\nResNet50, {layers} layers: {2 * layers} messages in a step, of {numbers} numbers")
    names = "".join(f"{network.name:>28}" for network in networks)
    print(f"replicas{names}   (milliseconds, forward + backward)")
    for replicas in (2**k for k in range(3, 11)):
        print(f"{replicas:8}", end="")
        for network in networks:
            parts = [network.seconds(replicas, channels) for channels in RESNET50]
            forward, backward = (1e3 * sum(one) for one in zip(*parts, strict=True))
            print(f"{f'{forward:.1f} + {backward:.1f}':>28}", end="")
        print()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, MOST])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        rank, replicas, port = given.worker
        work(int(rank), int(replicas), port, given.rounds)
        return
    if given.devices:
        on_devices(given.devices, given.rounds)
        return
    print(f"{keras.config.backend()}, Keras {keras.__version__}, {os.cpu_count()} cores")
    print(
        f"{'a part':>20} {'replicas':>8} {'':13} {'median ms':>10} {'least ms':>9}   to alone",
        end="",
    )
    print(" [quartiles]   error", flush=True)
    networks = [DOCUMENTED]
    for replicas in given.replicas:
        if keras.config.backend() == "torch":
            if constants := processes(replicas, given.rounds):
                gather, total, rate = constants
                hop = (gather, total / 2)
                networks.append(
                    Network("gloo, loopback", (0, 0), hop, hop, (rate, rate), replicas=1)
                )
        elif keras.config.backend() == "tensorflow":
            # In one process TensorFlow takes a strategy of 4 devices for the group of 2 before it.
            own = ["--devices", str(replicas), "--rounds", str(given.rounds)]
            subprocess.run([sys.executable, __file__, *own], check=True)  # noqa: S603
        else:
            rows(replicas, given.rounds)
    on_paper(networks)


def on_devices(replicas: int, rounds: int) -> None:
    """In a process of its own: replicas on parts of this machine's processor."""
    import tensorflow as tf

    (processor,) = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * MOST
    tf.config.set_logical_device_configuration(processor, parts)
    rows(replicas, rounds)


def rows(replicas: int, rounds: int) -> None:
    """Print the measured rows of so many replicas in this process."""
    for shape in SHAPES:
        print("\n".join(table(shape, replicas, rounds)), flush=True)


if __name__ == "__main__":
    main()
