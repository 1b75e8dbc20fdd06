"""A call takes what a call of Keras's layer takes, and does with it what that does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import truenorm as tn
from truenorm._layer.frozen_affine import FrozenAffine

ops: Any = keras.ops
VALUES = np.random.default_rng(0).normal(2.0, 3.0, (4, 5, 3))
KINDS = (keras.layers.BatchNormalization, tn.BatchNormalization)
MASK = np.arange(20).reshape(4, 5) % 3 > 0


def with_mask(dtype: str) -> Any:
    """A tensor that carries a mask, as behind a Masking layer."""
    values = np.where(MASK[..., None], VALUES, 0.0)
    return keras.layers.Masking(dtype=dtype)(values)


CALLS: dict[str, Callable[[Any], Any]] = {
    "a tensor": lambda layer: layer(ops.convert_to_tensor(VALUES, "float32"), training=True),
    "an array": lambda layer: layer(VALUES.astype("float32"), training=True),
    "an array of another dtype": lambda layer: layer(VALUES, training=True),
    "an array without more": lambda layer: layer(VALUES),
    "integers": lambda layer: layer(VALUES.astype("int32"), training=True),
    "a tensor of another dtype": lambda layer: layer(
        ops.convert_to_tensor(VALUES, "float16"), training=True
    ),
    "by name": lambda layer: layer(inputs=VALUES, training=True),
    "a mask as an array": lambda layer: layer(VALUES, training=True, mask=MASK),
    "a tensor and a mask": lambda layer: layer(
        ops.convert_to_tensor(VALUES, "float32"), mask=ops.convert_to_tensor(MASK), training=True
    ),
    "a mask on the input": lambda layer: layer(with_mask("float32"), training=True),
    "a mask on an input of another dtype": lambda layer: layer(with_mask("float16"), training=True),
}


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_does_what_that_of_the_stock_layer_does(
    call: Callable[[Any], Any], dtype: str
) -> None:
    stock, ours = (
        kind(dtype=dtype, momentum=0.5)
        for kind in (keras.layers.BatchNormalization, tn.BatchNormalization)
    )
    expected, got = call(stock), call(ours)
    assert keras.backend.standardize_dtype(got.dtype) == keras.backend.standardize_dtype(
        expected.dtype
    )
    within = 2e-5 if dtype == "float32" else 5e-3
    for one, other in ((got, expected), (ours.moving_mean, stock.moving_mean)):
        np.testing.assert_allclose(*map(ops.convert_to_numpy, (one, other)), within, within)
    masked, ours_masked = (getattr(tensor, "_keras_mask", None) for tensor in (expected, got))
    assert (ours_masked is None) is (masked is None)
    if masked is not None:
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (ours_masked, masked)))


@pytest.mark.parametrize(
    "arguments", [([1.0, 2.0],), (VALUES, True)], ids=["a list", "by position"]
)
def test_what_the_stock_layer_refuses_is_refused_in_its_words(arguments: Any) -> None:
    messages = []
    for kind in KINDS:
        with pytest.raises(ValueError, match="Only input tensors may be passed") as raised:
            kind()(*arguments)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", [tn.BatchNormalization, FrozenAffine])
def test_a_copy_takes_arrays_too(kind: Any) -> None:
    layer = kind()
    layer.build(VALUES.shape)
    for one in (copy.deepcopy(layer), kind.from_config(layer.get_config())):
        assert one(VALUES.astype("float64")).shape == VALUES.shape


def test_a_subclass_that_forgets_its_base_is_told_so() -> None:
    messages = []
    for kind in KINDS:
        made = type("Forgetful", (kind,), {"__init__": lambda _: None})()
        with pytest.raises(RuntimeError, match="'Forgetful', you forgot to call") as raised:
            made(VALUES)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_flags_can_be_set_and_set_back() -> None:
    layer = tn.BatchNormalization()
    for value in (True, False, True):
        layer.built = layer.supports_masking = value
        assert layer.built is layer.supports_masking is value
