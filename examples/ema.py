"""Averaged weights with stale statistics fail; recalibrated, they work.

``python examples/ema.py`` trains a small convolutional network on scikit-learn's handwritten digits
at a high learning rate, with the exponential average of its weights kept beside it (the optimizer's
``use_ema``). When ``fit`` ends, Keras puts the average into the model: weights that the model never
ran with. The moving statistics are still those of the weights that it did run with.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import truenorm as tn


def network() -> Any:
    """Three convolutions with BatchNormalization."""
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for filters in (16, 32, 32):
        model.add(keras.layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile(
        keras.optimizers.SGD(1.0, momentum=0.9, use_ema=True, ema_momentum=0.99),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def main() -> None:
    """Train, and evaluate the averaged weights with both statistics."""
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1297], order[1297:]
    model = network()
    model.fit(x[train], y[train], epochs=6, batch_size=32, verbose=0)

    def accuracy() -> float:
        return model.evaluate(x[test], y[test], verbose=0, return_dict=True)["accuracy"]

    stale = accuracy()
    done = tn.recalibrate(model, x[train], upstream="population", batch_size=256)
    print(done)
    print(f"averaged weights, statistics of the raw ones: accuracy {stale:.3f}")
    print(f"averaged weights, recalibrated:               accuracy {accuracy():.3f}")
    # In fit: callbacks=[tn.callbacks.Recalibrate(x[train])] does this when the training ends.


if __name__ == "__main__":
    main()
