"""BatchNormalization on two devices of JAX: there a batch is that of all of them, in any case.

``python examples/distributed_jax.py`` trains a small convolutional network on scikit-learn's
handwritten digits under ``keras.distribution.DataParallel``, on two devices made of this processor.
``python examples/distributed_jax.py processes`` does it on two processes with a device each: it
starts a second one on this machine, and ends it. Then the same network is trained on one device
with whole batches: that is what the two have to equal. With ``synchronized=True`` they do, as on
every backend; under JAX they do without it, too.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
if len(sys.argv) == 1:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import keras
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from sklearn.datasets import load_digits

import truenorm as tn

BATCH, STEPS = 64, 25


def network(synchronized: bool) -> Any:
    """One convolution with BatchNormalization; the same weights each time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, use_bias=False),
            tn.BatchNormalization(momentum=0.9, synchronized=synchronized, name="bn"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss)
    return model


def digits(rank: int, ranks: int, steps: range) -> Iterator[tuple[Any, Any]]:
    """This process's part of each batch."""
    x, y = load_digits(return_X_y=True)
    x, part = (x / 16).astype("float32").reshape(-1, 8, 8, 1), BATCH // ranks
    for step in steps:
        start = step * BATCH + rank * part
        yield x[start : start + part], y[start : start + part]


def train(rank: int, ranks: int, synchronized: bool) -> dict[str, Any]:
    """The first step's gradient, and the statistics at the end."""
    warnings.filterwarnings("ignore", "Your input ran out of data|.shuffle=True. was passed")
    model = network(synchronized)
    before = np.concatenate([np.ravel(weight) for weight in model.get_weights()])
    model.fit(digits(rank, ranks, range(1)), verbose=0)
    after = np.concatenate([np.ravel(weight) for weight in model.get_weights()])
    model.fit(digits(rank, ranks, range(1, STEPS)), verbose=0)
    bn = model.get_layer("bn")
    return {
        "gradient": before - after,  # since the learning rate is 1
        "moving mean": np.asarray(bn.moving_mean.value),
        "moving variance": np.asarray(bn.moving_variance.value),
    }


def compare() -> None:
    """Train with and without ``synchronized=True``, and say what comes of it."""
    rank, ranks = jax.process_index(), jax.process_count()
    for synchronized in (True, False):
        # Each process reads its own part: there is nothing for Keras to divide.
        devices = keras.distribution.DataParallel(auto_shard_dataset=False)
        keras.distribution.set_distribution(devices)
        found = train(rank, ranks, synchronized)
        keras.distribution.set_distribution(None)
        alone = train(0, 1, synchronized=False)
        everyones = {name: process_allgather(mine) for name, mine in found.items()}
        if rank == 0:
            print(f"synchronized={synchronized}, {jax.device_count()} devices in {ranks} processes")
            for name, mine in found.items():
                far = np.abs(mine - alone[name]).max() / np.abs(alone[name]).max()
                agree = np.all(everyones[name].reshape(ranks, -1) == mine)
                print(
                    f"  {name + ':':16} {far:.0e} from that of one device; "
                    f"the processes {'agree' if agree else 'disagree'}"
                )


def work(rank: int, port: str) -> None:
    """One of two processes."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    compare()
    jax.distributed.shutdown()  # both together


def processes() -> None:
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
    if sys.argv[1:] == []:
        compare()
    elif sys.argv[1:] == ["processes"]:
        processes()
    else:
        work(1, sys.argv[1])
