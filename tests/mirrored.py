"""The tools on a model that was made under a strategy of two replicas, and on one that was not.

A program of its own: TensorFlow divides the processor into devices before it is used.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from small_models import dense, subclassed

import truenorm as tn


def compiled(build: Any) -> Any:
    keras.utils.set_random_seed(3)
    model = build()
    model.compile("adam", "mse", metrics=["mae"])
    return model


def found(model: Any, x: np.ndarray, y: np.ndarray) -> tuple[Any, ...]:
    """A diagnosis, and populations."""
    diagnosis = tn.diagnose(model, x, y, batch_size=16)
    collected = [tn.collect(model, x, batch_size=16, upstream=u) for u in ("batch", "population")]
    return diagnosis, *collected, tn.recalibrate(model, x, batch_size=16).population


def check(build: Any, x: np.ndarray, y: np.ndarray, strategy: Any) -> None:
    plain = compiled(build)
    with strategy.scope():
        model = compiled(build)
        model.fit(x, y, batch_size=16, verbose=0)
        plain.set_weights(model.get_weights())
        first = found(model, x, y)
    expected, outside = found(plain, x, y), found(model, x, y)
    assert first[0].checked == outside[0].checked == expected[0].checked
    for one, other, again in zip(expected[1:], first[1:], outside[1:], strict=True):
        for path, moments in one.sites.items():
            for its in (other.sites[path], again.sites[path]):
                np.testing.assert_allclose(its.mean, moments.mean, rtol=1e-5)
                np.testing.assert_allclose(its.variance, moments.variance, rtol=1e-4)
    for mine, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    (processor,) = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(processor, parts)
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert mirrored.num_replicas_in_sync == 2
    generator = np.random.default_rng(0)
    for kind, width in ((dense, 5), (subclassed, 3)):
        data = generator.normal(3.0, 2.0, (128, width)).astype("float32")
        check(kind, data, data[:, :3], mirrored)
