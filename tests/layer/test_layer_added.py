"""``layer(x, add=residual)``: the layer, the sum and the activation are those of three layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, error, gradients, tensor

import truenorm as tn
from truenorm import BatchNormalization, DataError

ops: Any = keras.ops
RNG = np.random.default_rng(5)
X, R, DY = (RNG.normal(1, 2, (8, 6, 5, 3)).astype("float32") for _ in range(3))
MASK = RNG.random((8, 6, 5)) < 0.7
ULP = 2.0**-23

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels first": {"axis": 1},
    "no gamma and beta": {"scale": False, "center": False},
    "renorm": {"renorm": True},
    "ghosts": {"virtual_batch_size": 4},
    "synchronized": {"synchronized": True},
    "statistics frozen": {"freeze": "statistics"},
    "frozen": {"freeze": "all"},
    "accumulated": {"accumulation_steps": 2},
    "domains": {"domains": 2},
}


def pair(activation: Any, **options: Any) -> tuple[Any, Any]:
    """A layer that does all three, and one that leaves the sum and the activation to others."""
    layers = [BatchNormalization(activation=a, **options) for a in (activation, None)]
    for layer in layers:
        layer.build(X.shape)
        values = np.random.default_rng(0).uniform(0.5, 1.5, (9, *layer.moving_mean.shape))
        for variable, value in zip(layer.variables, values, strict=False):
            if variable.name not in ("gathered", "domain"):
                variable.assign(
                    np.broadcast_to(value.ravel()[: variable.shape[-1]], variable.shape)
                )
    return layers[0], layers[1]


def both(activation: Any, options: dict[str, Any], **arguments: Any) -> tuple[Any, Any]:
    together, alone = pair(activation, **options)
    function = keras.activations.get(activation)

    def fused(x: Any, add: Any) -> Any:
        with keras.StatelessScope():
            return together(x, add=add, **arguments)

    def apart(x: Any, add: Any) -> Any:
        with keras.StatelessScope():
            return function(alone(x, **arguments) + add)

    at = [tensor(X), tensor(R)]
    found = [gradients(call, at, tensor(DY)) for call in (fused, apart)]
    together(at[0], add=at[1], **arguments)
    alone(at[0], **arguments)
    for one, other in zip(together.variables, alone.variables, strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-6)
    return found[0], found[1]


CASES = [("relu", name) for name in OPTIONS] + [
    (activation, name) for activation in (None, "tanh") for name in ("plain", "renorm")
]


def compare(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Output, and the gradients of the input and of what is added."""
    assert error(array(found[0]), array(expected[0])) < 8 * ULP
    for have, want in zip(found[1], expected[1], strict=True):
        assert error(array(have), array(want)) < 32 * ULP


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "name"), CASES)
def test_as_three_layers(activation: Any, name: str, training: bool) -> None:
    compare(*both(activation, OPTIONS[name], training=training))


@pytest.mark.parametrize("options", [{}, {"axis": 1}, {"virtual_batch_size": 4}], ids=str)
def test_with_a_mask(options: dict[str, Any]) -> None:
    mask = tensor(MASK, "bool")
    compare(*both("relu", options, training=True, mask=mask))


def test_samples_of_several_domains() -> None:
    domain = ops.convert_to_tensor([0, 1] * 4)
    compare(*both("relu", {"domains": 2}, training=True, domain=domain))


def test_keras_s_own_mask_still_counts() -> None:
    inputs, residual = keras.Input((6, 3)), keras.Input((6, 3))
    masked = keras.layers.Masking()(inputs)
    layer = BatchNormalization(momentum=0.0)
    model = keras.Model([inputs, residual], layer(masked, add=residual))
    x = X[:, :, 0].copy()
    x[:, 4:] = 0
    model([x, R[:, :, 0]], training=True)
    np.testing.assert_allclose(array(layer.moving_mean), x[:, :4].mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_mixed_precision(policy: str, training: bool) -> None:
    dtype = policy.removeprefix("mixed_")
    layer, wide = BatchNormalization(activation="relu", dtype=policy), BatchNormalization()
    output = layer(tensor(X), training=training, add=tensor(R))
    x, r = (ops.cast(ops.cast(tensor(v), dtype), "float32") for v in (X, R))
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    expected = np.maximum(array(wide(x, training=training) + r), 0)
    ulp = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    assert error(array(output), expected) < 4 * ulp


def residual_model() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(3, 3, padding="same", name="conv")(inputs)
    y = BatchNormalization(activation="relu", name="fused")(x, add=inputs)
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(y)))


@pytest.mark.parametrize("load", [keras.saving.load_model, tn.archive.load], ids=["keras", "ours"])
def test_a_file_has_it(tmp_path: Path, load: Any) -> None:
    model = residual_model()
    model.compile("sgd", "mse")
    x = RNG.normal(size=(8, 6, 6, 3)).astype("float32")
    model.fit(x, np.zeros((8, 2)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = load(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    (before,), (after,) = (
        [layer for layer in one.layers if layer.name == "fused"] for one in (model, loaded)
    )
    for one in (model, loaded):
        one.compile("sgd", "mse")
        one.fit(x, np.zeros((8, 2)), verbose=0)
    np.testing.assert_allclose(array(after.moving_mean), array(before.moving_mean), rtol=1e-5)


def test_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"not of the shape of its output.*add of shape \(8, 1, 5"):
        BatchNormalization().call(tensor(X), add=tensor(R[:, :1]))
