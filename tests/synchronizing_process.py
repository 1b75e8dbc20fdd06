"""One of two processes that train alone and synchronize their statistics, on the backend in use.

``python synchronizing_process.py RANK FOLDER PORT PORT`` writes what it had and got of each way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from collecting_process import start
from small_models import dense, shake

import truenorm as tn

COUNTS = (3, 9)
NAMES = ("moving_mean", "moving_variance", "renorm_mean", "renorm_stddev", "moving_stddev")


def model(rank: int) -> Any:
    """Two layers, one with renorm, whose statistics are this process's own."""
    keras.utils.set_random_seed(5)
    renorm = keras.layers.BatchNormalization(renorm=True, name="renorm")
    return shake(keras.Sequential([keras.Input((5,)), *dense().layers, renorm]), seed=rank)


def statistics(network: Any) -> dict[str, np.ndarray]:
    found = [variable for variable in network.variables if variable.name in NAMES]
    values = [np.array(keras.ops.convert_to_numpy(variable)) for variable in found]
    paths = ["/".join(variable.path.split("/")[-2:]) for variable in found]
    return dict(zip(paths, values, strict=True))


def main(rank: str, folder: str, *ports: str) -> None:
    out, own = Path(folder), int(rank)
    with start(own, list(ports)):
        network = model(own)
        before = statistics(network)
        done = tn.sync_statistics(network, count=COUNTS[own])
        after = statistics(network)
        done.undo()
        undone = statistics(network)

        network = model(own)
        network.get_layer("bn").moving_mean.assign(np.full(6, np.nan if own else 2.0))
        tn.sync_statistics(network)
        poisoned = statistics(network)

        network = model(own)
        network.compile("sgd", "mse")
        x = np.random.default_rng(own).normal(own, 1.0, (8 + 8 * own, 5)).astype("float32")
        callback = tn.callbacks.SyncStatistics()
        if keras.config.backend() != "tensorflow":  # there fit itself is the strategy's
            network.fit(x, np.zeros((len(x), 3)), batch_size=8, callbacks=[callback], verbose=0)
        fitted = statistics(network)
        for name, found in (("before", before), ("after", after), ("undone", undone),
                            ("poisoned", poisoned), ("fitted", fitted)):  # fmt: skip
            np.savez(out / f"{name} {own}.npz", **found)
        said = {"record": str(done), "callback": str(callback.last)}
        try:
            tn.sync_statistics(network, count=-1 if own else 1)
        except (tn.DataError, tn.OptionError) as error:
            said["failure"] = str(error)
        for name, text in said.items():
            (out / f"{name} {own}.txt").write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
