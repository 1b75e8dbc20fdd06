"""BatchNormalization in ``jax.shard_map`` and ``jax.pmap``, where each device sees its own part.

``python examples/mapped_jax.py`` trains a small convolutional network on scikit-learn's handwritten
digits in a loop of its own, on two devices made of this processor, each with half of every batch.
Then the same network is trained on one device with whole batches: that is what the two have to
equal. With ``synchronized=True`` they do, without it they do not, and each has moving statistics of
its own. (Under ``jax.jit`` a batch is that of all devices in any case: ``distributed_jax.py``.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import keras
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from sklearn.datasets import load_digits

import truenorm as tn

BATCH, STEPS = 64, 25
Step = Callable[..., Any]
"""From weights, statistics, images and digits to gradient, new weights and new statistics."""


def network(synchronized: bool) -> Any:
    """One convolution with BatchNormalization; the same weights each time."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, use_bias=False),
            tn.BatchNormalization(momentum=0.9, synchronized=synchronized),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )


def step_of(model: Any) -> Step:
    """A step of gradient descent on one device's part of a batch."""
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(weights: Any, moving: Any, x: Any, y: Any) -> Any:
        def loss(weights: Any) -> Any:
            logits, moved = model.stateless_call(weights, moving, x, training=True)
            return loss_of(y, logits), moved

        gradient, moved = jax.grad(loss, has_aux=True)(weights)
        gradient = jax.lax.pmean(gradient, "batch")
        stepped = jax.tree.map(lambda weight, slope: weight - slope, weights, gradient)
        return gradient, stepped, moved

    return step


def by_pmap(step: Step, devices: int) -> Step:
    """The step on each device; all arrays have the devices as their first axis."""
    return jax.pmap(step, "batch", devices=jax.devices()[:devices])


def by_shard_map(step: Step, devices: int) -> Step:
    """As :func:`by_pmap`."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",))

    def part(*given: Any) -> Any:
        own = jax.tree.map(lambda array: array[0], given)
        return jax.tree.map(lambda array: array[None], step(*own))

    every = PartitionSpec("batch")
    program = jax.shard_map(part, mesh=mesh, in_specs=every, out_specs=every, check_vma=False)
    return jax.jit(program)


def train(by: Callable[[Step, int], Step], devices: int, synchronized: bool) -> dict[str, Any]:
    """The first step's gradient, and the statistics at the end, of each device."""
    model = network(synchronized)
    step = by(step_of(model), devices)
    trainable, others = model.trainable_variables, model.non_trainable_variables
    weights, moving = (
        [np.stack([variable.numpy()] * devices) for variable in variables]
        for variables in (trainable, others)
    )
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    first = None
    for start in range(0, STEPS * BATCH, BATCH):
        images, digits = (
            a[start : start + BATCH].reshape(devices, -1, *a.shape[1:]) for a in (x, y)
        )
        gradient, weights, moving = step(weights, moving, images, digits)
        first = gradient if first is None else first
    flat = np.concatenate([np.reshape(part, (devices, -1)) for part in first or ()], axis=1)
    mean, variance = map(np.asarray, moving)
    return {"gradient": flat, "moving mean": mean, "moving variance": variance}


def main() -> None:
    """Train with and without ``synchronized=True``, and say what comes of it."""
    alone = train(by_pmap, 1, synchronized=False)
    for by, name in ((by_shard_map, "jax.shard_map"), (by_pmap, "jax.pmap")):
        for synchronized in (True, False):
            print(f"synchronized={synchronized}, 2 devices, {name}")
            for what, found in train(by, 2, synchronized).items():
                far = np.abs(found[0] - alone[what]).max() / np.abs(alone[what]).max()
                agree = "agree" if np.all(found == found[0]) else "disagree"
                print(f"  {what + ':':16} {far:.0e} from that of one device; the devices {agree}")


if __name__ == "__main__":
    main()
