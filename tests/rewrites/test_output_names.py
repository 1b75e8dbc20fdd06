"""Names of a model's outputs, by which losses, metrics and targets are told, through rewrites."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from small_models import predict, shake

import truenorm as tn

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    "tool", [tn.fold, lambda m: tn.fold(m, where="*"), lambda m: tn.place(m, "none")]
)
def test_outputs_keep_the_names_by_which_losses_are_told(tool: Any, single: bool) -> None:
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, name="hidden")(inputs)
    outputs = [keras.layers.BatchNormalization(name="mean")(hidden)]
    outputs += [] if single else [keras.layers.Dense(2, name="other")(inputs)]
    model = keras.Model(inputs, outputs[0] if single else outputs)
    targets = {"mean": np.ones((8, 3)), "other": np.ones((8, 2))}
    losses = {"mean": "mse", "other": "mae"}
    names = ["mean"] if single else ["mean", "other"]
    model.compile("sgd", {name: losses[name] for name in names}, metrics={"mean": ["mae"]})
    y = targets["mean"] if single else targets
    done = tool(shake(model))
    new = done.model
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    assert new.output_names == model.output_names == names
    expected, found = (m.evaluate(x, y, verbose=0, return_dict=True) for m in (model, new))
    assert found.keys() == expected.keys()
    if done.kind == "fold":
        assert found == pytest.approx(expected, rel=1e-5)
    new.fit(x, y, verbose=0)


def functional(chain: list[Any]) -> Any:
    inputs = keras.Input((4,))
    x: Any = inputs
    for layer in chain:
        x = layer(x)
    return keras.Model(inputs, x)


def sequential(chain: list[Any]) -> Any:
    return keras.Sequential([keras.Input((4,)), *chain])


def two_outputs(chain: list[Any]) -> Any:
    model = functional(chain)
    return keras.Model(model.input, [model.output, keras.layers.Dense(2)(model.input)])


@pytest.mark.parametrize("tool", ["fold", "place"])
@pytest.mark.parametrize(
    "build",
    [
        functional, sequential, two_outputs,
        lambda chain: functional([functional(chain)]),
        lambda chain: functional([sequential(chain)]),
        lambda chain: sequential([functional(chain)]),
        lambda chain: sequential([sequential(chain)]),
    ],
    ids=["functional", "sequential", "two", "f in f", "s in f", "f in s", "s in s"],
)  # fmt: skip
def test_outputs_keep_their_dtype(build: Any, tool: str) -> None:
    """Of a float32 output of a model that computes in 16 bits, whose last layer goes."""
    site = keras.layers.BatchNormalization(name="n", dtype="float32")
    dense = keras.layers.Dense(3, dtype="float32" if tool == "fold" else "mixed_bfloat16")
    model = build([dense, keras.layers.Dropout(0.1, dtype="mixed_bfloat16"), site])
    rewrite = tn.fold(model) if tool == "fold" else tn.place(model, "none")
    assert len(rewrite.changed) == 1
    assert [y.dtype for y in rewrite.model.outputs] == [y.dtype for y in model.outputs]
    made = keras.tree.flatten(rewrite.model(np.ones((2, 4), "float32"), training=False))
    assert {keras.backend.standardize_dtype(y.dtype) for y in made} == {"float32"}


@pytest.mark.parametrize("build", [functional, sequential])
def test_an_output_that_keeps_its_dtype_has_a_name_that_is_free(build: Any) -> None:
    bfloat = {"dtype": "mixed_bfloat16"}
    model = build([
        keras.layers.Dense(6, name="n_output"),
        keras.layers.Dense(3, **bfloat),
        keras.layers.ReLU(**bfloat, name="r"),
        keras.layers.BatchNormalization(dtype="float32", name="n"),
    ])  # fmt: skip
    new = tn.place(model, "before_activation").model
    assert [layer.name for layer in new.layers][-3:] == ["n", "r", "n_output_"]
    assert new.outputs[0].dtype == "float32"
    assert predict(new, np.ones((2, 4), "float32"))[0].dtype == np.float32


def test_of_an_output_that_is_an_input_of_another_only_the_other_is_named() -> None:
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, name="hidden")(inputs)
    site = keras.layers.BatchNormalization(name="site")
    model = keras.Model(inputs, [hidden, site(hidden), site(keras.ops.relu(hidden))])
    new = tn.place(model, "none").model
    assert new.output_names == model.output_names == ["hidden", "site", "site"]
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    first, second, third = predict(new, x)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, np.maximum(first, 0))


@pytest.mark.parametrize("fused", [False, True])
def test_an_output_that_moves_into_the_model_keeps_its_name_there(fused: bool) -> None:
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3, activation="relu" if fused else None, name="hidden")(inputs)
    x = x if fused else keras.layers.ReLU(name="relu")(x)
    outputs = [keras.layers.BatchNormalization(name="site")(x), keras.layers.Dense(2)(inputs)]
    new = tn.place(keras.Model(inputs, outputs), "before_activation").model
    assert [layer.name for layer in new.layers].count("site") == 1
    assert new.output_names[0] == ("hidden_activation" if fused else "relu")
    assert (predict(new, np.ones((2, 4), "float32"))[0] >= 0).all()
