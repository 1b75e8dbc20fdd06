"""One of two workers that train a synchronized layer, until the second is lost: run as a program.

``python losing_worker.py RANK HOW PORT PORT``: the first writes to its output, in JSON, how it
ended. The second is killed, stops as a machine does that hangs, or never comes to the next step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import truenorm as tn

PATIENCE = 20.0
"""Seconds for which workers wait for each other."""


def batch(rank: int) -> Any:
    return tf.constant(np.random.default_rng(rank).normal(rank, 1, (8, 3)).astype("float32"))


def is_lost(how: str) -> None:
    """The end of the second worker."""
    if how.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    signal.pause()


def main(rank: int, how: str, *ports: str) -> None:
    workers = [f"127.0.0.1:{port}" for port in ports]
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=PATIENCE)
    patient = how != "never_comes"
    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=None if patient else options
    )
    with strategy.scope():
        layer = tn.BatchNormalization(synchronized=True, momentum=0.5)
        model = keras.Sequential([keras.Input((3,)), layer])

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(x, training=True)))
        return tape.gradient(loss, layer.gamma.value)

    def run(x: Any) -> Any:
        return strategy.run(step, (x,))

    if how != "killed_eagerly":
        run = tf.function(run)
    x = strategy.experimental_distribute_values_from_function(lambda _: batch(rank))
    run(x)
    mean = layer.moving_mean.numpy().tolist()
    print(f"rank {rank} has trained", flush=True)
    if rank == 1:
        is_lost(how)
    try:
        if how == "killed_before_a_tool":
            with strategy.scope():
                tn.sync_statistics(model)
        else:
            run(x)
    except Exception as error:
        said = {"name": type(error).__name__, "message": str(error), "mean": mean}
        print(json.dumps(said), flush=True)
        os._exit(0)  # TensorFlow would wait for the other one


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
