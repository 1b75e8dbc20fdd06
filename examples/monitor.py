"""What BatchNormalization does while a model trains, and a warning before the training is over.

``python examples/monitor.py`` trains a small convolutional network on scikit-learn's handwritten
digits twice. First as it should be; then with images that have one dead column, as a broken sensor
or a wrong crop makes them, straight into a BatchNormalization. ``callbacks.Monitor`` puts a few
numbers into the logs, and warns at the end of the first epoch.
"""

from __future__ import annotations

import warnings
from typing import Any

import keras
from sklearn.datasets import load_digits

import truenorm as tn


def network() -> Any:
    """BatchNormalization on the columns of the image, then a convolution with its own."""
    model = keras.Sequential(
        [
            keras.Input((8, 8)),
            keras.layers.BatchNormalization(name="columns"),
            keras.layers.Conv1D(16, 3, use_bias=False),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(x: Any, y: Any) -> tn.Monitoring | None:
    """Three epochs under the monitor; prints what the logs have."""
    monitor = tn.callbacks.Monitor()
    logs = network().fit(x, y, epochs=3, batch_size=32, callbacks=[monitor], verbose=0).history
    for name in ("accuracy", "bn_distance", "bn_noise", "bn_dead"):
        print(f"  {name:12}", *(f"{value:.3f}" for value in logs[name]))
    return monitor.history


def main() -> None:
    """Train both."""
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8)
    x[:, :, [0, 7]] = x[:, :, [1, 6]]  # the outer columns are nearly empty in this data
    print("as it should be:")
    train(x, y)
    x[:, :, 3] = 1.0
    print("with a dead column:")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        print(train(x, y))
    for warning in found:
        if str(warning.message).startswith("TN"):
            print(warning.message)


if __name__ == "__main__":
    main()
