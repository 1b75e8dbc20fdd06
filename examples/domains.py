"""Two kinds of data in one network: one set of statistics fails both, one for each does not.

``python examples/domains.py`` trains a small convolutional network on scikit-learn's handwritten
digits, in turn on batches as they are and on batches as another camera would take them: bright,
and with little contrast. In training each batch is normalised with its own mean and variance, so
both kinds are learned. In inference an ordinary BatchNormalization has one mean and one variance
for both, which are right for neither; a layer with domains has those of each.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import truenorm as tn

STEPS = 400


def network(domains: int | None) -> Any:
    """Two convolutions with BatchNormalization, for so many domains."""
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for filters in (16, 32):
        model.add(keras.layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(tn.BatchNormalization(momentum=0.9, domains=domains))
        model.add(keras.layers.ReLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10, activation="softmax"))
    rate = keras.optimizers.schedules.CosineDecay(1e-2, STEPS)  # so the averages can catch up
    model.compile(
        keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def train(model: Any, kinds: list[Any], y: Any) -> None:
    """A batch of each kind in turn, each in its domain."""
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        rows, index = rng.choice(len(y), 32, replace=False), step % 2
        with tn.domain(index):
            model.train_on_batch(kinds[index][rows], y[rows])


def main() -> None:
    """Train with and without domains, and print what both are worth on each kind of data."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    kinds = [x, 0.5 + 0.5 * x]
    for domains in (None, 2):
        keras.utils.set_random_seed(0)
        model = network(domains)
        train(model, [kind[:1297] for kind in kinds], y[:1297])
        found = []
        for index, kind in enumerate(kinds):
            with tn.domain(index):
                scores = model.evaluate(kind[1297:], y[1297:], verbose=0, return_dict=True)
            found.append(scores["accuracy"])
        name = "one set of statistics" if domains is None else "statistics for each domain"
        print(f"{name + ':':28} accuracy {found[0]:.3f} and {found[1]:.3f}")


if __name__ == "__main__":
    main()
