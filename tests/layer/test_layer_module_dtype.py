"""PyTorch's ``model.half()`` and the like change the tensors behind Keras's variables."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array

import truenorm as tn

pytestmark = pytest.mark.skipif(keras.config.backend() != "torch", reason="about PyTorch")

X = np.random.default_rng(4).normal(1, 2, (16, 5, 4)).astype("float32")
Y = np.zeros((16, 1), "float32")
DTYPES = {"half": 2.0**-11, "bfloat16": 2.0**-8, "double": 2.0**-24}
"""What a stored number may be off by, relative to itself; the data is float32."""

OPTIONS = [
    {},
    {"momentum": None},
    {"renorm": True},
    {"virtual_batch_size": 8},
    {"bessel_correction": True},
    {"axis": 1},
    {"synchronized": True},
]


def model(change: str, **options: Any) -> Any:
    inputs = keras.Input((5, 4))
    x = tn.BatchNormalization(name="bn", **options)(inputs)
    network = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))
    network.compile(keras.optimizers.SGD(0.01), "mse")
    return getattr(network, change)()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("change", DTYPES)
def test_training_moves_the_statistics(change: str, options: dict[str, Any]) -> None:
    network = model(change, **{"momentum": 0.75, **options})
    layer = network.get_layer("bn")
    network.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    rows = tuple(a for a in range(3) if a != layer.axis % 3)
    mean, variance, size = X.mean(rows), X.var(rows), X.size // X.shape[layer.axis]
    share = 1.0 if layer.momentum is None else 1 - 0.75**2
    if layer.virtual_batch_size is not None:
        variance = np.mean([X[start::2].var(rows) for start in range(2)], axis=0)
    if layer.bessel_correction or layer.momentum is None:
        variance = variance * size / (size - 1)
    tolerance = 4 * DTYPES[change]
    np.testing.assert_allclose(array(layer.moving_mean), share * mean, rtol=tolerance)
    if layer.renorm:
        deviation = 1 - share + share * np.sqrt(variance + layer.epsilon)
        variance, share = deviation**2 - layer.epsilon, 1.0
    expected = 1 - share + share * variance
    np.testing.assert_allclose(array(layer.moving_variance), expected, rtol=2 * tolerance)


@pytest.mark.parametrize("change", DTYPES)
def test_all_the_rest_goes_on(change: str) -> None:
    network = model(change)
    layer = network.get_layer("bn")
    network.fit(X, Y, verbose=0)
    tn.freeze(network, "statistics")
    before = array(layer.moving_mean)
    network.fit(X, Y, verbose=0)
    assert (array(layer.moving_mean) == before).all()
    tn.unfreeze(network)
    network.fit(X, Y, verbose=0)
    assert (array(layer.moving_mean) != before).any()

    population = tn.collect(network, X).sites["bn"]
    np.testing.assert_allclose(population.mean, X.mean((0, 1)), rtol=1e-6)
    tn.recalibrate(network, X)
    tolerance = 2 * DTYPES[change]
    np.testing.assert_allclose(array(layer.moving_mean), population.mean, rtol=tolerance)
    np.testing.assert_allclose(array(layer.moving_variance), population.variance, rtol=tolerance)

    with tn.observe(network) as seen:
        network.fit(X, Y, verbose=0)
        network.predict(X, verbose=0)
    assert [calls.describe() for calls in seen.modes["bn"].calls] == [
        "1× training=True: batch",
        "1× training=False: moving",
    ]
    outputs = network.predict(X, verbose=0)
    replaced = tn.replace(network, to="keras").model
    np.testing.assert_allclose(replaced.predict(X, verbose=0), outputs, atol=0.1)
