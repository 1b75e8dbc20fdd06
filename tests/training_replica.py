"""Two replicas that train one layer once, on the backend in use: run as a program of its own.

``python training_replica.py RANK INPUTS...`` reads from each file ``x``, ``gradient``, ``gamma``,
``beta``, ``split``, the layer's ``options`` in JSON, and perhaps ``mask``, gives the first
``split`` samples to one replica and the others to the second. It writes output, gradients and
moving statistics, and the collectives that each way took, with their bytes. On JAX ``mapped`` says
how else than by ``jax.jit`` the program is divided, and ``devices`` among how many.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

if os.environ["KERAS_BACKEND"] == "jax":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import keras
import numpy as np

from truenorm import BatchNormalization

Arrays = dict[str, Any]


def build(given: Arrays) -> Any:
    options = {"synchronized": True, "momentum": 0.0, **json.loads(str(given["options"]))}
    layer = BatchNormalization(**options)
    layer.build((None, *given["x"].shape[1:]))
    layer.gamma.assign(given["gamma"])
    layer.beta.assign(given["beta"])
    return layer


def shares(given: Arrays) -> list[Arrays]:
    """What each replica gets of the samples."""
    parts = (slice(None, int(given["split"])), slice(int(given["split"]), None))
    names = [name for name in ("x", "gradient", "mask") if name in given]
    return [{name: given[name][part] for name in names} for part in parts]


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives of ``torch.distributed``, each with the bytes that this process gives."""
    from torch import distributed

    calls: list[str] = []
    own = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Any:
        def collective(*tensors: Any, **options: Any) -> None:
            calls.append(f"{name} {tensors[-1].nbytes}")
            own[name](*tensors, **options)

        return collective

    for name in own:
        setattr(distributed, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in own.items():
            setattr(distributed, name, function)


@contextlib.contextmanager
def passes_of(given: Arrays) -> Iterator[None]:
    """Those of a GPU, which Triton interprets here, if they are asked for."""
    if "triton" not in given:
        yield
        return
    from truenorm._kernels.torch import passes, triton_passes

    with mock.patch.object(passes, "_passes", return_value=triton_passes):
        yield


def on_torch(given: Arrays, rank: int) -> Arrays:
    import torch

    layer, own = build(given), shares(given)[rank]
    x = torch.tensor(own["x"], requires_grad=True)
    mask = torch.tensor(own["mask"]) if "mask" in own else None
    with counted() as forward:
        output = layer(x, training=True, mask=mask)
    with counted() as backward:
        output.backward(torch.tensor(own["gradient"]))
    found = {
        "output": output.detach(),
        "x": x.grad,
        "moving_mean": layer.moving_mean.value,
        "moving_variance": layer.moving_variance.value,
        "forward": forward,
        "backward": backward,
    }
    weights = {"gamma": layer.gamma.value.grad, "beta": layer.beta.value.grad}
    found |= {name: value for name, value in weights.items() if value is not None}
    if "second" in given:
        found = {name: np.array(value) for name, value in found.items()}  # Gradients add up.
        found |= second_derivatives(layer, torch.tensor(own["x"]), torch.tensor(own["gradient"]))
    return found


def second_derivatives(layer: Any, x: Any, gradient: Any) -> Arrays:
    """Those of the sum of squares of the gradients of x and gamma; and collectives without x's."""
    import torch

    x.requires_grad_()
    gamma = layer.gamma.value
    output = layer(x, training=True)
    first = torch.autograd.grad(output, (x, gamma), gradient, create_graph=True)
    sum(part.square().sum() for part in first).backward()
    output = layer(x.detach(), training=True)
    with counted() as calls:
        output.backward(gradient)
    return {"second": x.grad, "constant": calls}


@functools.cache
def mirrored() -> Any:
    """One for all cases: another would number its collectives anew, and TensorFlow mix them up."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def on_tensorflow(given: Arrays) -> Arrays:
    import tensorflow as tf

    strategy, parts = mirrored(), shares(given)
    with strategy.scope():
        layer = build(given)

    calls: dict[str, list[str]] = {"forward": [], "backward": []}
    way = threading.local()  # A replica is a thread.
    own = tf.distribute.ReplicaContext.all_reduce

    def counting(replica: Any, op: Any, values: Any) -> Any:
        for value in tf.nest.flatten(values):
            calls[way.now].append(f"all_reduce {value.shape.num_elements() * value.dtype.size}")
        return own(replica, op, values)

    @tf.function
    def step(own: Any) -> Any:
        weights = [layer.gamma.value, layer.beta.value]
        way.now = "forward"
        with tf.GradientTape() as tape:
            tape.watch([own["x"], *weights])
            output = layer(own["x"], training=True, mask=own.get("mask"))
        way.now = "backward"
        return output, *tape.gradient(output, [own["x"], *weights], own["gradient"])

    values = strategy.experimental_distribute_values_from_function(
        lambda context: {
            name: tf.constant(value)
            for name, value in parts[context.replica_id_in_sync_group].items()
        }
    )
    whole = tf.function(lambda given: strategy.run(step, (given,)))
    with mock.patch.object(tf.distribute.ReplicaContext, "all_reduce", counting):
        graph = whole.get_concrete_function(values)
    output, x, gamma, beta = map(strategy.experimental_local_results, graph(values))
    found = {
        "output": np.concatenate(output),
        "x": np.concatenate(x),
        "gamma": sum(gamma),
        "beta": sum(beta),
        "moving_mean": layer.moving_mean.value,
        "moving_variance": layer.moving_variance.value,
        **calls,
        "collectives": sum(
            node.op.startswith("Collective")
            for function in graph.graph.as_graph_def().library.function
            for node in function.node_def
        ),
    }
    if "second" in given:
        second = tf.function(lambda given: strategy.run(step_of_gradients, (layer, given)))
        found["second"] = np.concatenate(strategy.experimental_local_results(second(values)))
    return found | fitted(strategy, given) if "fit" in given else found


def step_of_gradients(layer: Any, own: Any) -> Any:
    """As :func:`second_derivatives`."""
    import tensorflow as tf

    gamma = layer.gamma.value
    with tf.GradientTape() as outer:
        outer.watch(own["x"])
        with tf.GradientTape() as tape:
            tape.watch([own["x"], gamma])
            output = layer(own["x"], training=True)
        first = tape.gradient(output, [own["x"], gamma], own["gradient"])
        loss = sum(tf.reduce_sum(tf.square(part)) for part in first)
    return outer.gradient(loss, own["x"])


def fitted(strategy: Any, given: Arrays) -> Arrays:
    """The statistics after ``fit`` of one batch, as Keras compiles it."""
    options = json.loads(str(given["options"]))
    with strategy.scope():
        layer = BatchNormalization(synchronized=True, momentum=0.0, **options)
        network = keras.Sequential([keras.Input(given["x"].shape[1:]), layer])
        network.compile("sgd", "mse")
    network.fit(given["x"], given["x"], batch_size=len(given["x"]), verbose=0)
    return {"fitted": layer.moving_variance.value}


def on_jax(given: Arrays) -> Arrays:
    import jax

    devices = keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"])
    keras.distribution.set_distribution(None if "mapped" in given else devices)
    layer = build(given)
    moving = [v.value for v in layer.non_trainable_variables]
    weights = [v.value for v in layer.trainable_variables]
    own = {name: given[name] for name in ("x", "gradient", "mask") if name in given}

    def step(own: Arrays, weights: Sequence[Any]) -> Any:
        def call(x: Any, weights: Sequence[Any]) -> Any:
            mask = own.get("mask")
            return layer.stateless_call(weights, moving, x, training=True, mask=mask)

        output, pull, moved = jax.vjp(call, own["x"], weights, has_aux=True)
        found = {
            "output": output,
            **dict(zip(("x", "weights"), pull(own["gradient"]), strict=True)),
        }
        return found, moved

    def second(own: Arrays, weights: Sequence[Any]) -> Any:
        """The derivative of the sum of squares of the gradients of x and gamma."""

        def loss(x: Any) -> Any:
            found, _ = step({**own, "x": x}, weights)
            return (found["x"] ** 2).sum() + (found["weights"][0] ** 2).sum()

        return {"x": jax.grad(loss)(own["x"]), "weights": []}, []

    run = functools.partial(mapped, given) if "mapped" in given else spread
    found, moved, program = run(step, own, weights)
    names = [v.name for v in layer.trainable_variables]
    for name, value in zip(names, found.pop("weights"), strict=True):
        found[name] = value
    for variable, value in zip(layer.non_trainable_variables, moved, strict=True):
        if variable.name.startswith("moving_"):
            found[variable.name] = value
    # A sum of several arrays is one, and XLA may have joined those of both ways.
    collectives = r"^.*= (.*?) (all-\w+|reduce-\w+|collective-\w+)\("
    found["collectives"] = re.findall(collectives, program, re.M)
    if "second" in given:
        found["second"] = run(second, own, weights)[0]["x"]
    return found


def spread(step: Any, own: Arrays, weights: Sequence[Any]) -> tuple[Arrays, Any, str]:
    """What a program gives whose batch lies on all devices; the moving statistics; its text."""
    import jax

    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    program, own = jax.jit(step), jax.device_put(own, rows)
    found, moved = program(own, weights)
    assert len(found["output"].sharding.device_set) == 2
    return found, moved, program.lower(own, weights).compile().as_text()


def mapped(
    given: Arrays, step: Any, own: Arrays, weights: Sequence[Any]
) -> tuple[Arrays, Any, str]:
    """The same of a program for each device, that has its part of the batch."""
    import jax
    from jax.sharding import AxisType, PartitionSpec

    how, devices = str(given["mapped"]), int(given["devices"])
    if how == "pmap":
        program = jax.pmap(step, "batch", devices=jax.devices()[:devices])
        own = {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in own.items()}
        weights = [np.stack([value] * devices) for value in weights]
    else:
        mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
        rows, same = PartitionSpec("batch"), PartitionSpec()
        checked = how == "shard_map"  # Then JAX sums the gradients of what all have.
        made = {"output": rows, "x": rows, "weights": same if checked else rows}
        if step.__name__ == "second":
            del made["output"]
        program = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(rows, same),
                out_specs=(made, same if checked else rows),
                check_vma=checked,
            )
        )
    found, moved = program(own, weights)
    text = program.lower(own, weights).compile().as_text()
    found = {
        name: value if name == "weights" else np.reshape(value, given["x"].shape)
        for name, value in found.items()
    }
    if how != "shard_map":
        moved = [np.reshape(value, (devices, -1)) for value in moved]
        assert all((value == value[0]).all() for value in moved)  # to the bit
        moved = [value[0] for value in moved]
        gradients = found.pop("weights")
        found["weights"] = [np.reshape(value, (devices, -1)).sum(0) for value in gradients]
    return found, moved, text


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


def main(rank: str, *paths: str) -> None:
    start(int(rank), pathlib.Path(paths[0]).parent)
    for path in paths:
        given = dict(np.load(path))
        if keras.config.backend() == "torch":
            with passes_of(given):
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
