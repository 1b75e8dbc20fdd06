"""One of two processes of JAX, of which the second is lost: run as a program.

``python lost_replica.py RANK killed|stopped PORT PORT``: after one step of a synchronized layer
over both the second process dies or stops; the first one goes on to the next step.
"""

from __future__ import annotations

import os
import signal
import sys

import jax
import keras
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import truenorm as tn

PATIENCE = 10
"""Seconds without a sign of life after which a process is lost."""


def main(rank: str, fate: str, port: str, _: str) -> None:
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=int(rank),
        heartbeat_timeout_seconds=PATIENCE,
        shutdown_timeout_seconds=PATIENCE,
    )
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    layer = tn.BatchNormalization(synchronized=True)
    layer.build((None, 3))
    weights = [[v.value for v in layer.trainable_variables],
               [v.value for v in layer.non_trainable_variables]]  # fmt: skip

    def part(x: jax.Array) -> jax.Array:
        return layer.stateless_call(*weights, x, training=True)[0]

    step = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec))
    own = np.full((4, 3), float(rank), "float32")
    x = jax.make_array_from_process_local_data(rows, own)
    found = step(x).addressable_shards[0].data
    wanted = (own - 0.5) / np.sqrt(0.25 + layer.epsilon)
    assert np.allclose(found, wanted, atol=1e-5), keras.config.backend()
    print("first step done", flush=True)
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    step(x).block_until_ready()
    print("second step done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
