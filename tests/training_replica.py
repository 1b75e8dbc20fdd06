"""Two replicas that train one layer once, on the backend in use: run as a program of its own.

``python training_replica.py RANK INPUTS...`` reads from each file ``x``, ``gradient``, ``gamma``,
``beta`` and perhaps ``mask`` and ``axis``, gives the first ``split`` samples to one replica and the
others to the second. It writes output, gradients and moving statistics, and how many collectives
each way took.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

if os.environ["KERAS_BACKEND"] == "jax":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np

from truenorm import BatchNormalization

Arrays = dict[str, Any]


def build(given: Arrays) -> Any:
    axis = int(given.get("axis", -1))
    layer = BatchNormalization(axis=axis, synchronized=True, momentum=0.0)
    layer.build((None, *given["x"].shape[1:]))
    layer.gamma.assign(given["gamma"])
    layer.beta.assign(given["beta"])
    return layer


def shares(given: Arrays) -> list[Arrays]:
    """What each replica gets of the samples."""
    parts = (slice(None, int(given["split"])), slice(int(given["split"]), None))
    names = [name for name in ("x", "gradient", "mask") if name in given]
    return [{name: given[name][part] for name in names} for part in parts]


def on_torch(given: Arrays, rank: int) -> Arrays:
    import torch
    from torch import distributed

    calls: list[int] = []
    reduce = distributed.all_reduce

    def counted(values: Any) -> None:
        calls.append(values.numel())
        reduce(values)

    distributed.all_reduce = counted
    layer, own = build(given), shares(given)[rank]
    x = torch.tensor(own["x"], requires_grad=True)
    mask = torch.tensor(own["mask"]) if "mask" in own else None
    output = layer(x, training=True, mask=mask)
    forward = len(calls)
    output.backward(torch.tensor(own["gradient"]))
    distributed.all_reduce = reduce
    return {
        "output": output.detach(),
        "x": x.grad,
        "gamma": layer.gamma.value.grad,
        "beta": layer.beta.value.grad,
        "moving_mean": layer.moving_mean.value,
        "moving_variance": layer.moving_variance.value,
        "collectives": np.array([forward, len(calls) - forward]),
    }


def on_tensorflow(given: Arrays) -> Arrays:
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    parts = shares(given)
    with strategy.scope():
        layer = build(given)

    @tf.function
    def step(own: Any) -> Any:
        weights = [layer.gamma.value, layer.beta.value]
        with tf.GradientTape() as tape:
            tape.watch([own["x"], *weights])
            output = layer(own["x"], training=True, mask=own.get("mask"))
        return output, *tape.gradient(output, [own["x"], *weights], own["gradient"])

    values = strategy.experimental_distribute_values_from_function(
        lambda context: {
            name: tf.constant(value)
            for name, value in parts[context.replica_id_in_sync_group].items()
        }
    )
    graph = tf.function(lambda given: strategy.run(step, (given,))).get_concrete_function(values)
    output, x, gamma, beta = (strategy.experimental_local_results(r) for r in graph(values))
    return {
        "output": np.concatenate(output),
        "x": np.concatenate(x),
        "gamma": sum(gamma),
        "beta": sum(beta),
        "moving_mean": layer.moving_mean.value,
        "moving_variance": layer.moving_variance.value,
    } | fitted(strategy, given)


def fitted(strategy: Any, given: Arrays) -> Arrays:
    """The statistics after ``fit`` of one batch, as Keras compiles it."""
    with strategy.scope():
        layer = BatchNormalization(axis=int(given.get("axis", -1)), synchronized=True, momentum=0.0)
        network = keras.Sequential([keras.Input(given["x"].shape[1:]), layer])
        network.compile("sgd", "mse")
    network.fit(given["x"], given["x"], batch_size=len(given["x"]), verbose=0)
    return {"fitted": layer.moving_variance.value}


def on_jax(given: Arrays) -> Arrays:
    import jax

    distribution = keras.distribution.distribution()
    layer = build(given)
    spread = jax.sharding.NamedSharding(
        distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec("batch")
    )
    x, gradient = (jax.device_put(given[name], spread) for name in ("x", "gradient"))
    mask = jax.device_put(given["mask"], spread) if "mask" in given else None
    moving = [v.value for v in layer.non_trainable_variables]

    @jax.jit
    def step(x: Any, weights: Sequence[Any], gradient: Any) -> Any:
        def call(x: Any, weights: Sequence[Any]) -> Any:
            return layer.stateless_call(weights, moving, x, training=True, mask=mask)

        output, pull, moved = jax.vjp(call, x, weights, has_aux=True)
        return output, *pull(gradient), moved

    weights = [v.value for v in layer.trainable_variables]
    output, d_x, (gamma, beta), (mean, variance) = step(x, weights, gradient)
    assert len(output.sharding.device_set) == 2
    return {
        "output": output,
        "x": d_x,
        "gamma": gamma,
        "beta": beta,
        "moving_mean": mean,
        "moving_variance": variance,
    }


def start(rank: int, folder: pathlib.Path) -> None:
    """Make two replicas of this process, or one of two."""
    if keras.config.backend() == "torch":
        from torch import distributed

        store = f"file://{folder / 'store'}"
        distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, logical)
    else:
        devices = ["cpu:0", "cpu:1"]
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))


def main(rank: str, *paths: str) -> None:
    start(int(rank), pathlib.Path(paths[0]).parent)
    for path in paths:
        given = dict(np.load(path))
        if keras.config.backend() == "torch":
            found = on_torch(given, int(rank))
        else:
            found = (on_jax if keras.config.backend() == "jax" else on_tensorflow)(given)
        arrays = {name: np.asarray(value) for name, value in found.items()}
        np.savez(f"{path}.found{rank}.npz", **arrays)
    if keras.config.backend() == "torch":
        from torch import distributed

        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
