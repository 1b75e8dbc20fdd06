"""Two processes of ``torch.distributed`` in each of several situations: run as a program.

``python forked_replicas.py FOLDER``: each situation is a function below; two processes run it, each
with its rank, and what it returns is written to ``FOLDER/<situation> <rank>.json``. They are forked
from this one, which has imported everything, and are ended with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from training_replica import counted

import truenorm as tn

PATIENCE = 5.0
"""Seconds for which processes wait for each other."""


def layer(**options: Any) -> Any:
    made = tn.BatchNormalization(synchronized=True, momentum=0.5, **options)
    made.build((None, 3))
    return made


def batch(rank: int, rows: int = 4) -> Any:
    x = np.random.default_rng(rank).normal(rank, 1, (rows, 3)).astype("float32")
    return torch.tensor(x, requires_grad=True)


def failure(function: Callable[[], Any]) -> dict[str, Any]:
    """How it ended."""
    try:
        function()
    except Exception as error:
        return {"name": type(error).__name__, "message": str(error)}
    return {"name": None, "message": ""}


def killed_before_forward(rank: int) -> Any:
    bn = layer()
    bn(batch(rank), training=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return failure(lambda: bn(batch(rank), training=True))


def killed_before_backward(rank: int) -> Any:
    output = layer()(batch(rank), training=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return failure(output.sum().backward)


def never_comes(rank: int) -> Any:
    bn = layer()
    if rank == 1:
        signal.pause()
    return failure(lambda: bn(batch(rank), training=True))


def model() -> Any:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            tn.BatchNormalization(synchronized=True, momentum=0.5, activation="relu"),
            keras.layers.Dense(1),
        ]
    )


def train(network: Any, parts: list[Any], parallel: Any = None) -> dict[str, Any]:
    """Steps of gradient descent on these batches; the loss is a sum over all samples."""
    replicas = 2 if parallel else 1  # whose gradients are averaged
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for part in parts:
        optimizer.zero_grad()
        output = (parallel or network)(part, training=True)
        (replicas * output.square().sum()).backward()
        optimizer.step()
    return {f"{i} {v.name}": v.numpy().tolist() for i, v in enumerate(network.variables)}


def steps(rank: int) -> list[Any]:
    """Three batches; in the last step the second process has run out of samples."""
    sizes = ((4, 6), (5, 3), (7, 0))
    return [batch(10 * i + rank, rows[rank]).detach() for i, rows in enumerate(sizes)]


def data_parallel(rank: int) -> Any:
    network = model()
    parallel = DistributedDataParallel(network)
    return train(network, steps(rank), parallel)


def as_one() -> Any:
    """The same in one process, with the batches of both."""
    return train(model(), [torch.cat(parts) for parts in zip(steps(0), steps(1), strict=True)])


def joins(rank: int) -> Any:
    """Uneven steps under join(): as it is, and with an early end."""
    found = {}
    for early in (False, True):
        network = model()
        parallel = DistributedDataParallel(network)

        def run(network: Any = network, parallel: Any = parallel, early: bool = early) -> None:
            with parallel.join(throw_on_early_termination=early):
                train(network, steps(rank)[: 2 + (rank == 0)], parallel)

        found[str(early)] = failure(run)
    return found


def groups(rank: int) -> Any:
    """A wrapper over a group of this process alone."""
    alone = [distributed.new_group([each]) for each in range(2)][rank]
    network = keras.Sequential([keras.Input((3,)), layer()])
    parallel = DistributedDataParallel(network, process_group=alone)
    with counted() as calls:
        parallel(batch(rank), training=True)
    return {"calls": calls, "mean": network.layers[0].moving_mean.numpy().tolist()}


def accumulation(rank: int) -> Any:
    """The moving statistics after the first and the second of two micro-batches."""
    bn = layer(accumulation_steps=2)
    found = []
    for each in range(2):
        bn(batch(10 * each + rank, 3 + each + 2 * rank), training=True)
        found.append([bn.moving_mean.numpy().tolist(), bn.moving_variance.numpy().tolist()])
    return found


def domains(rank: int) -> Any:
    """Domains by sample, one for all, and another on each process."""
    bn = layer(domains=2)
    x = batch(rank, 5)
    by_sample = torch.tensor([0, 1, 1, 0, 1] if rank == 0 else [0] * 5)
    output = bn(x, training=True, domain=by_sample)
    gradient = torch.arange(15.0).reshape(5, 3) + rank
    output.backward(gradient)
    found = {
        "output": output.tolist(),
        "x": x.grad.tolist(),
        "by_sample": [bn.moving_mean.numpy().tolist(), bn.moving_variance.numpy().tolist()],
    }
    bn = layer(domains=2)
    with tn.domain(1):
        bn(x, training=True)
    found["one"] = [bn.moving_mean.numpy().tolist(), bn.moving_variance.numpy().tolist()]
    with tn.domain(rank):
        found["apart"] = failure(lambda: bn(x, training=True))
    return found


SITUATIONS = (
    accumulation,
    domains,
    killed_before_forward,
    killed_before_backward,
    never_comes,
    data_parallel,
    joins,
    groups,
)


def replica(situation: Callable[[int], Any], rank: int, folder: Path) -> None:
    """What a process of its own does."""
    store = f"file://{folder / situation.__name__}"
    patience = timedelta(seconds=PATIENCE)
    distributed.init_process_group("gloo", store, patience, rank=rank, world_size=2)
    found = situation(rank)
    (folder / f"{situation.__name__} {rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    (folder / "as_one.json").write_text(json.dumps(as_one()))
    for situation in SITUATIONS:
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                try:
                    signal.alarm(60)
                    replica(situation, rank, folder)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        os.waitpid(children[0], 0)
        if situation is never_comes:
            os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[1], 0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, 0)
        raise SystemExit("a process is left")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
