"""One of several processes that collect statistics together, on the backend in use.

``python collecting_process.py RANK FOLDER PORT PORT`` writes what it got of each way of collecting.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from small_models import dense, shake

import truenorm as tn

SAMPLES = 44
"""Six batches of 8, the last one of 4: three for each of two processes."""


def model() -> Any:
    keras.utils.set_random_seed(5)
    chain = [keras.Input((5,)), *dense().layers, keras.layers.BatchNormalization(name="second")]
    return shake(keras.Sequential(chain))


def data() -> np.ndarray:
    return np.random.default_rng(4).normal(1.0, 2.0, (SAMPLES, 5)).astype("float32")


def start(rank: int, ports: list[str]) -> Any:
    """Join the processes of the framework; gives the scope to work in."""
    if keras.config.backend() == "jax":
        import jax

        jax.distributed.initialize(f"127.0.0.1:{ports[0]}", num_processes=2, process_id=rank)
    elif keras.config.backend() == "torch":
        from torch import distributed

        address = f"tcp://127.0.0.1:{ports[0]}"
        distributed.init_process_group("gloo", address, rank=rank, world_size=2)
        return left_together()
    else:
        workers = [f"127.0.0.1:{port}" for port in ports]
        task = {"type": "worker", "index": rank}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
        import tensorflow as tf

        return tf.distribute.MultiWorkerMirroredStrategy().scope()
    return contextlib.nullcontext()


@contextlib.contextmanager
def left_together() -> Iterator[None]:
    """Ends the group of processes before any of them ends: at exit its threads may still run."""
    from torch import distributed

    yield
    distributed.barrier()
    distributed.destroy_process_group()


def main(rank: str, folder: str, *ports: str) -> None:
    out, own = Path(folder), int(rank)
    with start(own, list(ports)):
        network, x = model(), data()
        part = x[24:] if own else x[:24]
        found = {
            "shared": tn.collect(network, x, batch_size=8),
            "settled": tn.collect(network, x, batch_size=8, upstream="population"),
            "own part": tn.collect(network, part, batch_size=8, shard=False),
            "one batch": tn.collect(network, x[:8], batch_size=8),  # nothing for the second
        }
        for name, population in found.items():
            population.save(out / f"{name} {own}.npz")
        broken = x[:, :1] if own else x
        try:
            tn.collect(network, broken, batch_size=8)
        except tn.DataError as error:
            (out / f"failure {own}.txt").write_text(str(error), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
