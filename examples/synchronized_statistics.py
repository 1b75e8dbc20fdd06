"""Two processes that train side by side, and leave with the same moving statistics.

``KERAS_BACKEND=torch python examples/synchronized_statistics.py`` starts two processes of its own
on this machine. Each normalises with its own batches, of digits that the other does not have, so
their moving statistics drift apart; ``callbacks.SyncStatistics`` makes them those of all the data,
weighted by steps, before every validation. (Under PyTorch or JAX; ``fit`` of Keras 3.15 does not
take TensorFlow's multi-worker strategy.)
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import truenorm as tn


def network() -> Any:
    """One BatchNormalization."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(10, "softmax")]
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def join(rank: int, port: str) -> None:
    """Make this process one of two."""
    if keras.config.backend() == "jax":
        import jax

        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    else:
        from torch import distributed

        address = f"tcp://127.0.0.1:{port}"
        distributed.init_process_group("gloo", address, rank=rank, world_size=2)


def work(rank: int, port: str) -> None:
    """Train on half of the digits: the lower ones, or the higher ones."""
    join(rank, port)
    x, y = load_digits(return_X_y=True)
    half = (y >= 5) == bool(rank)
    model, callback = network(), tn.callbacks.SyncStatistics()
    x = (x[half] / 16).astype("float32")
    model.fit(x, y[half], epochs=2, batch_size=32, callbacks=[callback], verbose=0)
    mean = keras.ops.convert_to_numpy(model.get_layer("bn").moving_mean)
    print(f"process {rank}: sum of the moving means {np.sum(mean, dtype=np.float64):.12f}")
    print(callback.last)
    if keras.config.backend() == "torch":
        from torch import distributed

        distributed.barrier()
        distributed.destroy_process_group()


def main() -> int:
    """Start both, wait for both, and leave none behind."""
    if keras.config.backend() == "tensorflow":
        print(tn.sync_statistics(network()))
        return 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, __file__]
    started = [subprocess.Popen([*program, str(rank), port], env=os.environ) for rank in (0, 1)]  # noqa: S603
    try:
        return max(process.wait(timeout=240) for process in started)
    finally:
        for process in started:
            process.kill()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(int(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(main())
