"""What a rewritten model must not lose, and must not share with the model that was given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from small_models import predict, shake, snapshot

import truenorm as tn
from truenorm._errors import ModelError
from truenorm._model.rebuild import rebuild
from truenorm._model.values import numbers

pytestmark = pytest.mark.any_backend

L = keras.layers
IMAGE, SERIES = (8, 8, 3), (6, 4)


def adapted(layer: Any, data: Any) -> Any:
    layer.adapt(data)
    return layer


def changed(layer: Any, method: str, *arguments: Any) -> Any:
    """A layer as after ``quantize`` or ``enable_lora``."""
    layer.build((None, *SERIES))
    getattr(layer, method)(*arguments)
    return layer


class Cell(L.Layer):
    """A cell of the user's own, with a function that no config can say."""

    def __init__(self, units: int, scale: Callable[[Any], Any]) -> None:
        super().__init__()
        self.units = self.state_size = units
        self.scale, self.dense = scale, L.Dense(units)

    def build(self, shape: Any) -> None:
        self.dense.build((shape[0], shape[-1] + self.units))

    def call(self, x: Any, states: Any) -> Any:
        y = self.scale(self.dense(keras.ops.concatenate([x, states[0]], -1)))
        return y, [y]


class Helper:
    """No layer, but it holds one."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        return self.layer(x)


class Odd(L.Layer):
    """Layers and variables in every place that a user can find, and no config at all."""

    def __init__(self, *units: int) -> None:
        super().__init__()
        self.many = [L.Dense(n) for n in units]
        self.named = {"a": L.Dense(4), "b": [L.Dense(4), L.Dense(4, name="last")]}
        self.helper = Helper(self.many[0])
        self.function = lambda x: self.many[-1](x)
        self.partial = functools.partial(self.scaled, factor=2.0)
        self.dropout, self.seeds = L.Dropout(0.3), keras.random.SeedGenerator(3)
        self.loose = keras.Variable(np.ones(4, "float32"), trainable=False, name="loose")
        self.sequential = keras.Sequential([L.Dense(4), L.BatchNormalization()])
        inputs = keras.Input((4,))
        self.functional = keras.Model(inputs, L.Dense(4)(inputs))

    def scaled(self, x: Any, factor: float) -> Any:
        return factor * x

    def call(self, x: Any, training: bool | None = None) -> Any:
        for layer in (*self.many, self.helper, self.function, self.named["a"], *self.named["b"]):
            x = layer(x)
        x = self.functional(self.sequential(x, training=training))
        return self.partial(self.dropout(x, training=training)) + self.loose


def closing_over() -> Any:
    dense = L.Dense(4)
    dense.build((None, 4))
    return L.Lambda(lambda x: dense(x), output_shape=(4,))


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "bidirectional": (lambda: L.Bidirectional(L.LSTM(3, dropout=0.1)), SERIES),
    "boundaries": (lambda: adapted(L.Discretization(num_bins=3), inputs(SERIES)), SERIES),
    "cells": (lambda: L.RNN([L.LSTMCell(3), L.GRUCell(2)]), SERIES),
    "closure": (closing_over, (4,)),
    "custom cell": (lambda: L.RNN(Cell(3, lambda x: 2 * x)), SERIES),
    "each step": (lambda: L.TimeDistributed(L.BatchNormalization()), SERIES),
    "einsum": (lambda: L.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"), SERIES),
    "groups": (lambda: L.GroupNormalization(1), IMAGE),
    "lambda": (lambda: L.Lambda(lambda x: 2 * x), SERIES),
    "lora": (lambda: changed(L.Dense(3), "enable_lora", 2), SERIES),
    "lora of a convolution": (lambda: changed(L.Conv1D(3, 2), "enable_lora", 2), SERIES),
    "odd": (lambda: Odd(4, 4), (4,)),
    "prelu": (lambda: L.PReLU("ones"), SERIES),
    "quantised": (lambda: changed(L.Dense(4), "quantize", "int8"), SERIES),
    "quantised to 4 bits": (lambda: changed(L.Dense(4), "quantize", "int4"), SERIES),
    "quantised to 8 bits": (lambda: changed(L.Dense(4), "quantize", "float8"), SERIES),
    "random": (lambda: L.RandomRotation(0.1), IMAGE),
    "scale": (lambda: adapted(L.Normalization(), inputs(SERIES)), SERIES),
    "spectral": (lambda: L.SpectralNormalization(L.Conv2D(2, 2)), IMAGE),
}


def inputs(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")


def values(model: Any) -> list[bytes]:
    return [numbers(variable).tobytes() for variable in model.variables]


def around(layer: Any, shape: tuple[int, ...]) -> Any:
    data = keras.Input(shape)
    return keras.Model(data, layer(data))


def assert_the_same(new: Any, old: Any, x: Any) -> None:
    """Outputs, names, paths and flags; nothing is shared."""
    for ours, theirs in zip(predict(new, x), predict(old, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [(v.path, v.trainable) for v in new.variables] == [
        (v.path, v.trainable) for v in old.variables
    ]
    assert [k.name for k in new._flatten_layers()] == [k.name for k in old._flatten_layers()]
    assert not {*map(id, new.variables)} & {*map(id, old.variables)}
    assert not {*map(id, new._flatten_layers())} & {*map(id, old._flatten_layers())}


WITH_TENSORFLOW = pytest.mark.other_packages
MARKED = [pytest.param(n, marks=WITH_TENSORFLOW if n == "boundaries" else ()) for n in LAYERS]


@pytest.mark.parametrize("name", MARKED)
def test_every_layer_is_copied_exactly(name: str) -> None:
    make, shape = LAYERS[name]
    model, x = around(make(), shape), inputs(shape)
    copy = rebuild(model)
    assert_the_same(copy, model, x)
    before = values(model)
    for variable in copy.variables:
        variable.assign(np.zeros(variable.shape))
    predict(copy, x)
    assert values(model) == before


@pytest.mark.parametrize("name", ["custom cell", "each step", "lora", "odd", "spectral"])
def test_a_copy_learns_and_the_original_stays(name: str) -> None:
    make, shape = LAYERS[name]
    model, x = around(make(), shape), inputs(shape)
    copy, before = rebuild(model), values(model)
    copy.compile("sgd", "mse")
    copy.fit(x, np.ones_like(predict(model, x)[0]), verbose=0)
    assert values(copy) != before
    assert values(model) == before


def test_a_copy_is_saved_and_loaded_as_the_original(tmp_path: Any) -> None:
    layers = [L.Bidirectional(L.LSTM(3)), L.Dense(3), L.BatchNormalization()]
    model = shake(keras.Sequential([keras.Input(SERIES), *layers]))
    copy = rebuild(model)
    assert copy.to_json() == model.to_json()
    copy.save(tmp_path / "copy.keras")
    loaded = keras.saving.load_model(tmp_path / "copy.keras")
    x = inputs(SERIES)
    np.testing.assert_array_equal(predict(loaded, x)[0], predict(model, x)[0])


@WITH_TENSORFLOW
def test_a_vocabulary_learned_anew_is_not_that_of_the_original() -> None:
    data = keras.Input((2,), dtype="int32")
    layer = adapted(L.IntegerLookup(), np.array([[1, 2], [2, 3]]))
    model = keras.Model(data, layer(data))
    x = np.array([[1, 2], [3, 7]], "int32")
    expected = predict(model, x)[0]
    copy = rebuild(model)
    np.testing.assert_array_equal(predict(copy, x)[0], expected)
    copy.layers[-1].adapt(np.array([[7, 7], [7, 8]]))
    np.testing.assert_array_equal(predict(model, x)[0], expected)


# --- single variables --------------------------------------------------------------------------

TOOLS: dict[str, Callable[[Any], tn.Rewrite]] = {
    "replace": lambda model: tn.replace(model, to="truenorm"),
    "place": lambda model: tn.place(model, "after_activation"),
    "none": lambda model: tn.place(model, "none"),
    "fold": tn.fold,
    "fold a part": lambda model: tn.fold(model, where="*"),
}


def chain() -> Any:
    """Two units; the second one's convolution has no bias."""
    layers = [
        L.Conv1D(4, 1, name="a"), L.BatchNormalization(name="a_bn"), L.ReLU(name="a_relu"),
        L.Conv1D(4, 1, use_bias=False, name="b"), L.BatchNormalization(name="b_bn"),
        L.ReLU(name="b_relu"), L.Dense(2, name="head"),
    ]  # fmt: skip
    return shake(keras.Sequential([keras.Input(SERIES), *layers]))


def learning(model: Any) -> set[str]:
    return {v.path.partition("/")[2] for v in model.trainable_variables}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_was_frozen_stays_frozen(tool: str) -> None:
    """Single variables, of layers that are edited and of those that are not."""
    model = chain()
    frozen = ["a/kernel", "b/kernel", "b_bn/beta", "head/bias"]
    for variable in model.variables:
        variable.trainable = variable.trainable and variable.path.partition("/")[2] not in frozen
    before, expected = snapshot(model), learning(model)
    new = TOOLS[tool](model).model
    assert snapshot(model) == before
    assert not learning(new) & set(frozen)
    if tool in ("replace", "place"):
        assert learning(new) == expected
    elif tool == "none":
        assert learning(new) == {"a/bias", "head/kernel"}  # beta did not learn, nor does b/bias
    else:
        assert learning(new) == {"a/bias", "head/kernel"}


def test_a_bias_that_stands_for_a_beta_learns_as_that_did() -> None:
    model = chain()
    assert "b/bias" in learning(tn.fold(model).model)
    assert "b/bias" in learning(tn.place(model, "none").model)
    tn.freeze(model)
    assert "b/bias" not in learning(tn.fold(model).model)
    assert "b/bias" not in learning(tn.place(model, "none").model)


def test_the_receipt_says_what_can_no_longer_learn() -> None:
    model = chain()
    model.get_layer("a").kernel.trainable = False
    model.get_layer("b").trainable = False
    assert [change.what for change in tn.fold(model).changed] == [
        "folded into Conv1D a before it, which is frozen: gamma can no longer learn",
        "folded into Conv1D b before it, which is frozen: gamma and beta can no longer learn",
    ]
    tn.freeze(model)
    assert "frozen" not in str(tn.fold(model).changed)


@pytest.mark.parametrize("tool", TOOLS)
def test_what_was_set_on_a_variable_is_carried(tool: str) -> None:
    model = chain()
    kernels = [model.get_layer(name).kernel for name in ("a", "head")]
    regularizer, constraint = keras.regularizers.L2(0.5), keras.constraints.NonNeg()
    for kernel in kernels:
        kernel.regularizer, kernel.constraint = regularizer, constraint
        kernel.overwrite_with_gradient = True
    new = TOOLS[tool](model).model
    for name in ("a", "head"):
        kernel = new.get_layer(name).kernel
        assert (kernel.regularizer, kernel.constraint) == (regularizer, constraint)
        assert kernel.overwrite_with_gradient


@pytest.mark.parametrize("tool", TOOLS)
def test_lora_goes_on_learning_without_its_base(tool: str) -> None:
    model = chain()
    model.get_layer("head").enable_lora(2)
    new = TOOLS[tool](model).model
    names = {path for path in learning(new) if path.startswith("head/")}
    assert names == {"head/bias", "head/lora_kernel_a", "head/lora_kernel_b"}


# --- what is shared, and what belongs to the model ----------------------------------------------


class Tied(L.Layer):
    """The transposed kernel of another layer of the model."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(x, keras.ops.transpose(self.other.kernel))


@pytest.mark.parametrize("how", ["layer", "variable"])
def test_what_was_shared_stays_shared(how: str) -> None:
    dense, data = L.Dense(3, use_bias=False, name="there"), keras.Input((3,))
    x = L.BatchNormalization()(dense(data))
    model = keras.Model(data, Tied(dense)(x) if how == "layer" else keras.ops.dot(x, dense.kernel))
    new = tn.replace(shake(model), to="truenorm").model
    assert [v.path for v in new.variables] == [v.path for v in model.variables]
    kernel = new.get_layer("there").kernel
    kernel.assign(np.zeros(kernel.shape))
    assert not predict(new, inputs((3,)))[0].any()
    assert predict(model, inputs((3,)))[0].all()


def test_a_layer_that_is_inside_another_one_too_takes_nothing_in() -> None:
    dense, data = L.Dense(3, name="there"), keras.Input((3,))
    x = L.BatchNormalization(name="bn")(dense(data))
    model = shake(keras.Model(data, Tied(dense)(x)))
    (left,) = tn.fold(model).left
    assert left.reason.startswith("Dense there is called more than once")


def test_attributes_of_the_users_own_are_carried() -> None:
    model = chain()
    model.threshold, model.get_layer("a").role = 0.5, "stem"
    model.favourite = model.get_layer("head")
    new = rebuild(model)
    assert (new.threshold, new.get_layer("a").role) == (0.5, "stem")
    assert new.favourite is new.get_layer("head")
    assert not hasattr(new, "history")


class Compiled(L.Layer):
    """A function that is bound to this very object, in a form that cannot be copied."""

    def __init__(self, factor: float, **options: Any) -> None:
        super().__init__(**options)
        self.factor = factor
        self.fast = functools.lru_cache(self.multiplied)

    def build(self, shape: Any) -> None:
        self.bias = self.add_weight(shape=shape[-1:], name="bias")

    def multiplied(self, times: int) -> float:
        return self.factor * times

    def call(self, x: Any) -> Any:
        return self.fast(2) * x + self.bias


def test_a_compiled_function_is_made_again_by_the_config() -> None:
    class Complete(Compiled):
        def get_config(self) -> Any:
            return {**super().get_config(), "factor": self.factor}

    model = around(Complete(2.0), (4,))
    new = rebuild(model)
    assert_the_same(new, model, inputs((4,)))
    new.layers[-1].factor = 3.0
    assert (new.layers[-1].fast(1), model.layers[-1].fast(1)) == (3.0, 2.0)


def test_a_layer_that_can_be_copied_in_no_way_is_named() -> None:
    class Refusing(Compiled):
        def get_config(self) -> Any:
            raise NotImplementedError("none")

    message = (
        r"^This Refusing cannot be made again from its config \(at 'mine'\)\. Received: none\. "
        r"Remedy: give its class a complete get_config\(\)\.$"
    )
    with pytest.raises(ModelError, match=message):
        rebuild(around(Refusing(2.0, name="mine"), (4,)))
