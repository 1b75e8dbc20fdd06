"""Which statistics normalise, which move and which weights learn, as each entry point decides."""

from __future__ import annotations

import pathlib
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, tensor

from truenorm import BatchNormalization

RNG = np.random.default_rng(5)
X = RNG.normal(3, 2, (32, 6, 6, 2)).astype("float32")
Y = RNG.normal(size=(32, 1)).astype("float32")
MEAN, VARIANCE = X.mean(axis=(0, 1, 2)), X.var(axis=(0, 1, 2))


def model(layer: Any) -> Any:
    """Input, BatchNormalization, and enough to have a loss."""
    inputs = keras.Input((6, 6, 2))
    outputs = keras.layers.Dense(1)(keras.layers.GlobalMaxPooling2D()(layer(inputs)))
    network = keras.Model(inputs, outputs)
    network.compile(keras.optimizers.SGD(0.1), "mse")
    return network


def state(layer: Any) -> dict[str, np.ndarray]:
    return {w.name: array(w) for w in layer.weights}


def moved(before: dict[str, np.ndarray], layer: Any) -> set[str]:
    """The names of the weights that changed."""
    return {name for name, value in state(layer).items() if (value != before[name]).any()}


ALL = {"gamma", "beta", "moving_mean", "moving_variance"}


def test_fit_trains_with_batch_statistics() -> None:
    layer = BatchNormalization(momentum=0.9)
    network = model(layer)
    before = state(layer)
    network.fit(X, Y, batch_size=32, epochs=1, verbose=0)
    assert moved(before, layer) == ALL
    np.testing.assert_allclose(array(layer.moving_mean), 0.1 * MEAN, rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), 0.9 + 0.1 * VARIANCE, rtol=1e-5)


def test_train_on_batch_does_as_fit_does() -> None:
    layer = BatchNormalization(momentum=0.9)
    network = model(layer)
    before = state(layer)
    network.train_on_batch(X, Y)
    assert moved(before, layer) == ALL
    np.testing.assert_allclose(array(layer.moving_mean), 0.1 * MEAN, rtol=1e-5)


def test_evaluate_predict_and_bare_calls_use_and_keep_the_moving_statistics() -> None:
    layer = BatchNormalization()
    network = model(layer)
    layer.moving_mean.assign([1.0, 2.0])
    layer.moving_variance.assign([4.0, 9.0])
    before = state(layer)
    expected = (X - np.array([1.0, 2.0])) / np.sqrt(np.array([4.0, 9.0]) + 1e-3)
    only_it = keras.Model(network.inputs, layer.output)
    np.testing.assert_allclose(only_it.predict(X, verbose=0), expected, atol=1e-5)
    np.testing.assert_allclose(array(layer(tensor(X))), expected, atol=1e-5)
    np.testing.assert_allclose(array(layer(tensor(X), training=False)), expected, atol=1e-5)
    network.evaluate(X, Y, verbose=0)
    network.test_on_batch(X, Y)
    network.predict_on_batch(X)
    assert moved(before, layer) == set()


def test_a_bare_call_in_training_mode_uses_the_batch() -> None:
    layer = BatchNormalization(momentum=0.9)
    output = array(layer(tensor(X), training=True))
    np.testing.assert_allclose(output.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(output.var(axis=(0, 1, 2)), 1, atol=1e-2)
    assert moved(
        {"moving_mean": np.zeros(2), "moving_variance": np.ones(2)} | state_of_affine(layer), layer
    ) == {"moving_mean", "moving_variance"}


def state_of_affine(layer: Any) -> dict[str, np.ndarray]:
    return {name: value for name, value in state(layer).items() if name in ("gamma", "beta")}


@pytest.mark.parametrize("when", ["at construction", "later"])
def test_frozen_runs_in_inference_mode_and_learns_nothing(when: str) -> None:
    layer = BatchNormalization(trainable=when != "at construction")
    if when == "later":
        layer.trainable = False
    network = model(layer)
    layer.moving_mean.assign([1.0, 2.0])
    before = state(layer)
    assert layer.trainable_variables == []
    network.fit(X, Y, batch_size=16, epochs=1, verbose=0)
    assert moved(before, layer) == set()
    frozen = array(layer(tensor(X), training=True))
    np.testing.assert_array_equal(frozen, array(layer(tensor(X), training=False)))


def test_unfrozen_and_compiled_again_it_learns() -> None:
    layer = BatchNormalization(trainable=False)
    network = model(layer)
    network.fit(X, Y, epochs=1, verbose=0)
    layer.trainable = True
    network.compile(keras.optimizers.SGD(0.1), "mse")
    before = state(layer)
    network.fit(X, Y, epochs=1, verbose=0)
    assert moved(before, layer) == ALL


def test_inference_mode_is_not_frozen() -> None:
    # With training=False the layer uses the moving statistics, and gamma and beta still learn.
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.bn = BatchNormalization()
            self.top = keras.layers.Dense(1)

        def call(self, x: Any, training: bool | None = None) -> Any:  # noqa: ARG002
            x = keras.ops.max(self.bn(x, training=False), axis=(1, 2))
            return self.top(x)

    network = Model()
    network.compile(keras.optimizers.SGD(0.1), "mse")
    network(X)
    before = state(network.bn)
    network.fit(X, Y, epochs=1, verbose=0)
    assert moved(before, network.bn) == {"gamma", "beta"}


def test_custom_training_loop_learns() -> None:
    layer = BatchNormalization(momentum=0.9)
    network = model(layer)
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(network.trainable_variables)
    before = state(layer)
    losses = [one_step(network, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert moved(before, layer) == ALL
    np.testing.assert_allclose(array(layer.moving_mean), MEAN * (1 - 0.9**8), rtol=1e-4)


def one_step(network: Any, optimizer: Any) -> float:
    """One step of the loop that the backend's users write."""
    if keras.config.backend() == "jax":
        import jax

        def loss(trainable: Any, moving: Any) -> Any:
            output, moving = network.stateless_call(trainable, moving, X, training=True)
            return keras.ops.mean(keras.ops.square(output - Y)), moving

        trainable = [v.value for v in network.trainable_variables]
        moving = [v.value for v in network.non_trainable_variables]
        (value, moving), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, moving)
        for variable, new in zip(network.non_trainable_variables, moving, strict=True):
            variable.assign(new)
        optimizer.apply(found, network.trainable_variables)
        return float(value)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = tf.reduce_mean(tf.square(network(X, training=True) - Y))
        optimizer.apply(
            tape.gradient(value, network.trainable_variables), network.trainable_variables
        )
        return float(value)
    import torch

    network.zero_grad()
    value = torch.square(network(X, training=True) - tensor(Y)).mean()
    value.backward()
    found = [v.value.grad for v in network.trainable_variables]
    with torch.no_grad():
        optimizer.apply(found, network.trainable_variables)
    return float(value.detach())


def test_learns_as_the_stock_layer_does() -> None:
    networks = []
    for kind in (BatchNormalization, keras.layers.BatchNormalization):
        keras.utils.set_random_seed(1)
        network = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                keras.layers.Conv2D(4, 3),
                kind(momentum=0.9),
                keras.layers.ReLU(),
                keras.layers.Flatten(),
                keras.layers.Dense(8),
                kind(momentum=0.9),
                keras.layers.Dense(1),
            ]
        )
        network.compile(keras.optimizers.SGD(0.01), "mse")
        network.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        networks.append(network)
    ours, stocks = (n.get_weights() for n in networks)
    for mine, stock in zip(ours, stocks, strict=True):
        np.testing.assert_allclose(mine, stock, rtol=2e-3, atol=2e-4)


def trained(kind: Any) -> Any:
    network = model(kind(momentum=0.5, gamma_regularizer="l2"))
    network.fit(X, Y, batch_size=16, epochs=1, verbose=0)
    return network


def test_saved_and_loaded_it_is_the_same(tmp_path: pathlib.Path) -> None:
    network = trained(BatchNormalization)
    network.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    layer = loaded.layers[1]
    assert type(layer) is BatchNormalization
    assert layer.get_config() == network.layers[1].get_config()
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), network.predict(X, verbose=0))
    before = state(layer)
    loaded.fit(X, Y, verbose=0)
    assert moved(before, layer) == ALL


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"renorm": True}])
def test_weights_go_between_us_and_the_stock_layer(
    tmp_path: pathlib.Path, ours_first: bool, options: dict[str, Any]
) -> None:
    kinds = [BatchNormalization, keras.layers.BatchNormalization]
    giver, taker = (model(k(**options)) for k in (kinds if ours_first else kinds[::-1]))
    giver.set_weights([RNG.uniform(0.5, 2, w.shape) for w in giver.weights])
    assert [w.name for w in giver.weights] == [w.name for w in taker.weights]
    expected = giver.predict(X, verbose=0)

    taker.set_weights(giver.get_weights())
    np.testing.assert_allclose(taker.predict(X, verbose=0), expected, rtol=1e-6)

    taker.set_weights([np.zeros(w.shape) for w in taker.weights])
    giver.save_weights(tmp_path / "model.weights.h5")
    taker.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(taker.predict(X, verbose=0), expected, rtol=1e-6)

    taker.set_weights([np.zeros(w.shape) for w in taker.weights])
    giver.save(tmp_path / "model.keras")
    taker.load_weights(tmp_path / "model.keras")
    np.testing.assert_allclose(taker.predict(X, verbose=0), expected, rtol=1e-6)


def test_a_stock_file_of_a_16_bit_model_is_read(tmp_path: pathlib.Path) -> None:
    giver = model(keras.layers.BatchNormalization(dtype="float16"))
    taker = model(BatchNormalization(dtype="float16"))
    giver.layers[1].moving_mean.assign([0.5, 1.5])
    giver.save_weights(tmp_path / "model.weights.h5")
    taker.load_weights(tmp_path / "model.weights.h5")
    assert array(taker.layers[1].moving_mean).tolist() == [0.5, 1.5]
    assert taker.layers[1].moving_mean.dtype == "float32"


def test_a_stock_config_makes_our_layer() -> None:
    stock = keras.layers.BatchNormalization(axis=1, momentum=0.7, beta_regularizer="l1")
    assert BatchNormalization.from_config(stock.get_config()).get_config() == stock.get_config()


def test_it_is_found_by_those_who_look_for_the_stock_layer() -> None:
    assert isinstance(BatchNormalization(), keras.layers.BatchNormalization)


def test_the_batch_path_is_one_method() -> None:
    # Whoever observes a layer wraps this method: it runs when the batch's statistics normalise.
    for options, calls in (({}, 1), ({"renorm": True}, 1), ({"trainable": False}, 0)):
        layer = BatchNormalization(**options)
        seen = []
        inner = layer._normalize_batch
        layer._normalize_batch = lambda *a, inner=inner, seen=seen: seen.append(1) or inner(*a)
        layer(tensor(X), training=False)
        layer(tensor(X), training=True)
        assert len(seen) == calls
