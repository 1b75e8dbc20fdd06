"""BatchNormalization on two processes of PyTorch: what ``synchronized=True`` is for.

``python examples/distributed_torch.py`` starts a second process on this machine, and ends it. The
two train a small convolutional network on scikit-learn's handwritten digits, each with half of
every batch (DistributedDataParallel over gloo). Then the first one trains the same network alone
with whole batches: that is what the two have to equal.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault(
    "GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo"
)  # this machine only

import keras
import torch
from sklearn.datasets import load_digits
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import truenorm as tn

RANKS, BATCH, STEPS = 2, 64, 25


def network(synchronized: bool) -> Any:
    """One convolution with BatchNormalization; the same weights each time."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, use_bias=False),
            tn.BatchNormalization(momentum=0.9, synchronized=synchronized, name="bn"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )


def digits(rank: int, ranks: int) -> list[tuple[Any, Any]]:
    """This process's part of each batch."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 8, 8, 1), torch.tensor(y)
    starts = range(rank * BATCH // ranks, STEPS * BATCH, BATCH)
    return [(x[at : at + BATCH // ranks], y[at : at + BATCH // ranks]) for at in starts]


def train(model: Any, call: Callable[..., Any], batches: Any) -> dict[str, Any]:
    """The first step's gradient, and the statistics at the end, of a loop as anybody writes it."""
    weights = [variable.value for variable in model.trainable_variables]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    first = None
    for x, y in batches:
        loss = torch.nn.functional.cross_entropy(call(x, training=True), y)
        optimizer.zero_grad()
        loss.backward()
        first = torch.cat([w.grad.ravel() for w in weights]) if first is None else first
        optimizer.step()
    bn = model.get_layer("bn")
    return {
        "gradient": first,
        "moving mean": bn.moving_mean.value,
        "moving variance": bn.moving_variance.value,
    }


def distance(found: Any, wanted: Any) -> float:
    """Largest difference, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def work(rank: int, port: str) -> None:
    """Train with and without synchronization, and say what comes of it."""
    distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=60),  # so long one waits for the other
    )  # fmt: skip
    for synchronized in (True, False):
        model = network(synchronized)
        parallel = DistributedDataParallel(model)  # averages the gradients
        found = train(model, parallel, digits(rank, RANKS))
        of_ranks = {name: everyones(part) for name, part in found.items()}
        if rank == 0:
            model = network(synchronized=False)
            alone = train(model, model, digits(0, 1))
            print(f"synchronized={synchronized}, {RANKS} processes, {BATCH} digits per step")
            for name, (mine, other) in of_ranks.items():
                far = distance(mine, alone[name])
                agree = "agree" if torch.equal(mine, other) else "disagree"
                print(f"  {name + ':':16} {far:.0e} from that of one process; the ranks {agree}")
    distributed.barrier()
    distributed.destroy_process_group()


def everyones(part: Any) -> list[Any]:
    """This tensor of all processes."""
    parts = [torch.empty_like(part) for _ in range(RANKS)]
    distributed.all_gather(parts, part.detach())
    return parts


def main() -> None:
    """Start the other process, be the first, and leave none behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with subprocess.Popen([sys.executable, __file__, port]) as other:  # noqa: S603
        try:
            work(0, port)
        except BaseException:
            other.kill()
            raise


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(1, sys.argv[1])
    else:
        main()
