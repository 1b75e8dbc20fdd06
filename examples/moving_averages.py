"""Exponential, cumulative and exact statistics of one training, and the plot of docs/statistics.md.

``python examples/moving_averages.py [FILE]`` trains a small network on scikit-learn's handwritten
digits and notes after every step, for each kind of statistics, how far they are from the
population's: the exact ones of the weights of that moment, over the whole training set. The plot
goes to docs/statistics.svg, or to FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import truenorm as tn

KINDS = {
    "exponential, momentum 0.99": {"momentum": 0.99},
    "exponential, momentum 0.9": {"momentum": 0.9},
    "cumulative (momentum=None)": {"momentum": None},
}
STEPS = 300


def network(momentum: float | None) -> Any:
    """Dense, BatchNormalization, ReLU, dense."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, use_bias=False),
            tn.BatchNormalization(momentum=momentum, name="bn"),
            keras.layers.ReLU(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    return model


def gap(model: Any, population: tn.Population) -> float:
    """Root mean square over the channels of what the mean is off by, in standard deviations."""
    moments = population.sites["bn"]
    held = np.float64(keras.ops.convert_to_numpy(model.get_layer("bn").moving_mean))
    return float(np.sqrt(np.mean(((held - moments.mean) / moments.standard_deviation) ** 2)))


def main() -> None:
    """Train once per kind: all take the same steps, since training does not use the statistics."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/statistics.svg")
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    order = np.random.default_rng(0).integers(0, len(x), size=(STEPS, 32))
    looks = np.unique(np.geomspace(1, STEPS, 40).astype(int))
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "truenorm"  # the same file for the same numbers
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    exact: list[float] = []
    for name, options in KINDS.items():
        model = network(**options)
        found: list[float] = []
        for step, rows in enumerate(order, 1):
            model.train_on_batch(x[rows], y[rows])
            if step in looks:
                population = tn.collect(model, x, batch_size=256)
                found.append(gap(model, population))
                if options["momentum"] == 0.99:
                    done = tn.recalibrate(model, population)
                    exact.append(gap(model, population))
                    done.undo()
        axes.plot(looks, found, label=name)
        print(f"{name:30} after {STEPS} steps: {found[-1]:.4f} standard deviations")
    axes.plot(looks, exact, label="exact (recalibrate)")
    print(f"{'exact (recalibrate)':30} after {STEPS} steps: {exact[-1]:.1e}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="training steps",
        ylabel="moving mean off by (standard deviations)",
        title="How far the statistics are from the population's, digits",
    )
    axes.legend()
    figure.savefig(target, metadata={"Date": None})
    print(f"written: {target}")


if __name__ == "__main__":
    main()
