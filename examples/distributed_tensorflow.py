"""BatchNormalization on two replicas of TensorFlow: what ``synchronized=True`` is for.

``python examples/distributed_tensorflow.py`` trains a small convolutional network on scikit-learn's
handwritten digits under ``MirroredStrategy``, on two devices made of this processor, each with half
of every batch. ``python examples/distributed_tensorflow.py processes`` does it in two processes
under ``MultiWorkerMirroredStrategy``: it starts a second one on this machine, and ends it. Then the
first one trains the same network on one device with whole batches: that is what the replicas have
to equal.

(The loop is written by hand, because ``fit`` of Keras 3.15 does not take a multi-worker strategy.
Under ``MirroredStrategy`` it does.)
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import truenorm as tn

REPLICAS, BATCH, STEPS = 2, 64, 25
tf.get_logger().setLevel("ERROR")


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


def digits() -> tuple[Any, Any]:
    """Pictures and labels."""
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32").reshape(-1, 8, 8, 1), y.astype("int32")


def train(strategy: Any, synchronized: bool) -> dict[str, Any]:
    """The first step's gradient, and the statistics at the end, with a row for each replica."""
    replicas = strategy.num_replicas_in_sync
    part = BATCH // replicas
    x, y = digits()
    with strategy.scope():
        model, optimizer = network(synchronized), keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
            loss = tf.reduce_mean(losses) / replicas
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)  # sums those of the replicas
        total = tf.distribute.get_replica_context().all_reduce("sum", gradients)
        return tf.concat([tf.reshape(one, [-1]) for one in total], 0)

    def own(at: int, context: Any) -> tuple[Any, Any]:
        start = at + part * context.replica_id_in_sync_group
        return tf.constant(x[start : start + part]), tf.constant(y[start : start + part])

    run = tf.function(lambda *batch: strategy.run(step, batch))
    gradients: list[Any] = []
    for at in range(0, STEPS * BATCH, BATCH):
        batch = strategy.experimental_distribute_values_from_function(partial(own, at))
        gradients.append(run(*batch))
    bn = model.get_layer("bn")
    return {
        "gradient": everyones(strategy, gradients[0]),
        "moving mean": everyones(strategy, bn.moving_mean.value),
        "moving variance": everyones(strategy, bn.moving_variance.value),
    }


def everyones(strategy: Any, value: Any) -> Any:
    """A row from each replica."""
    rows = tf.function(lambda own: strategy.run(lambda one: one[None], (own,)))(value)
    return np.asarray(strategy.gather(rows, axis=0))


def compare(strategy: Any, speaks: bool) -> None:
    """Train with and without synchronization, and say what comes of it."""
    for synchronized in (True, False):
        found = train(strategy, synchronized)
        alone = train(tf.distribute.OneDeviceStrategy("CPU:0"), synchronized=False)
        if speaks:
            print(f"synchronized={synchronized}, {REPLICAS} replicas, {BATCH} digits per step")
            for name, rows in found.items():
                far = np.abs(rows[0] - alone[name][0]).max() / np.abs(alone[name]).max()
                agree = "agree" if np.array_equal(*rows) else "disagree"
                print(f"  {name + ':':16} {far:.0e} from that of one device; the replicas {agree}")


def mirrored() -> None:
    """Two devices in this process."""
    (processor,) = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    tf.config.set_logical_device_configuration(processor, parts)
    compare(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), speaks=True)


def worker(index: int, ports: list[str]) -> None:
    """One of two processes."""
    workers = [f"127.0.0.1:{port}" for port in ports]
    task = {"type": "worker", "index": index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    compare(tf.distribute.MultiWorkerMirroredStrategy(), speaks=index == 0)


def processes() -> None:
    """Start the other process, be the first, and leave none behind."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    with subprocess.Popen([sys.executable, __file__, *ports]) as other:  # noqa: S603
        try:
            worker(0, ports)
        except BaseException:
            other.kill()
            raise


if __name__ == "__main__":
    if sys.argv[1:] == []:
        mirrored()
    elif sys.argv[1:] == ["processes"]:
        processes()
    else:
        worker(1, sys.argv[1:])
