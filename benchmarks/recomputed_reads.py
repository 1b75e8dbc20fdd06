"""Does a recomputed layer on TensorFlow see the weights that its forward pass saw?

Run as ``KERAS_BACKEND=tensorflow python benchmarks/recomputed_reads.py [TRAININGS]``. A network of
two dense layers and two small layers of Keras's kind under ``keras.RematScope`` takes one step of
SGD, again and again from the same seed, each time as a new model. All must end at the same weights.
Printed is how many did, with TensorFlow's options as they are, and without its pass
``dependency_optimization``.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

config: Any = tf.config
RANDOM = np.random.default_rng(0)
X, Y = (RANDOM.normal(size=(32, width)).astype("float32") for width in (5, 3))


class Scale(keras.layers.Layer):
    """A weight per channel behind a function of the input."""

    def build(self, shape: Any) -> None:
        """Make the weight."""
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        """Scale."""
        return keras.ops.tanh(x) * keras.ops.reshape(1.5 * self.scale, [1, -1])


def after_one_step() -> float:
    """The sum of the first kernel's magnitudes."""
    keras.utils.set_random_seed(3)
    with keras.RematScope("full"):
        first, second = Scale(), Scale()
    layers = [keras.layers.Dense(4), first, keras.layers.Dense(3), second]
    model = keras.Sequential([keras.Input((5,)), *layers])
    model.compile(keras.optimizers.SGD(5.0), "mse")
    model.train_on_batch(X, Y)
    return round(float(np.abs(keras.ops.convert_to_numpy(model.weights[0])).sum()), 3)


def main(trainings: int = 80) -> None:
    """Count, with the pass and without."""
    for on in (True, False):
        config.optimizer.set_experimental_options({"dependency_optimization": on})
        ends = Counter(after_one_step() for _ in range(trainings))
        most = ends.most_common(1)[0][1]
        print(f"dependency_optimization={on}: {most} of {trainings} end alike ({dict(ends)})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
