"""Remedies that are advice for the next model: one that is made so has the fault no more."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import test_diagnosis_rules as planted
from applied import Fault, Forgetful, X, found, small
from test_diagnosis_rules import DATA, chain, conv, functional
from test_remedies_calls import CALLED, PLACED
from test_remedies_statistics import STATISTICS

import truenorm as tn
from truenorm._diagnosis.table import RULES

pytestmark = pytest.mark.any_backend
L = keras.layers
ASK = "tn.diagnose(model, data, y)"


def narrow(units: int, dead: int) -> Any:
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(units, use_bias=False), L.BatchNormalization(name="bn")]
    )
    model.get_layer("bn").gamma.assign([1e-4] * dead + [1.0] * (units - dead))
    return model


def on_a_tiny_scale(epsilon: float = 1e-3) -> Any:
    model = small(L.BatchNormalization(name="bn", epsilon=epsilon))
    model.get_layer("bn").moving_variance.assign([1e-6, 1, 1, 1])
    return model


def steep(gamma: float) -> Any:
    model = small(L.BatchNormalization(name="bn"))
    model.get_layer("bn").moving_variance.assign([1e-6, 1, 1, 1])
    model.get_layer("bn").gamma.assign([gamma, 1, 1, 1])
    return model


def stepped() -> Any:
    model = small()
    model.compile(keras.optimizers.AdamW(weight_decay=1e-4), "mse")
    model.fit(DATA, DATA[:, :1], verbose=0)
    return model


def spared() -> Any:
    optimizer = keras.optimizers.AdamW(weight_decay=1e-4)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    model = small()
    model.compile(optimizer, "mse")
    model.fit(DATA, DATA[:, :1], verbose=0)
    return model


def of_two(share: bool) -> Any:
    left, right = keras.Input((4,)), keras.Input((4,))
    one = L.BatchNormalization(name="bn")
    other = one if share else L.BatchNormalization(name="other")
    return keras.Model([left, right], L.Dense(1)(L.Add()([one(left), other(right)])))


def over_time(wrapped: bool) -> Any:
    layer: Any = L.BatchNormalization(name="bn")
    layer = L.TimeDistributed(layer, name="each") if wrapped else layer
    return keras.Sequential([keras.Input((3, 4)), layer, L.Flatten(), L.Dense(1)])


class Cell(L.Layer):
    """One step of a recurrent layer, normalised."""

    def __init__(self, norm: Any) -> None:
        super().__init__(name="cell")
        self.norm = norm
        self.state_size = self.output_size = 4

    def build(self, shape: Any) -> None:
        self.norm.build(shape)
        self.built = True

    def call(self, x: Any, states: Any) -> Any:
        new = states[0] + self.norm(x)
        return new, [new]


def recurrent(norm: Any) -> Any:
    rnn = L.RNN(Cell(norm), name="rnn")
    other = L.BatchNormalization(name="other")
    return keras.Sequential([keras.Input((3, 4)), rnn, other, L.Dense(1)])


def accumulating(steps: int | None) -> Any:
    model = chain()
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=steps), "mse")
    return model


def gathering(steps: int) -> Any:
    model = small(tn.BatchNormalization(accumulation_steps=steps))
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=steps), "mse")
    return model


def biased(use_bias: bool) -> Any:
    return functional(conv(use_bias=use_bias), L.BatchNormalization(name="bn"), L.Flatten(),
                      L.Dense(1))  # fmt: skip


def complete() -> Any:
    layers: list[Any] = []
    for _ in range(4):
        layers += [conv(), tn.BatchNormalization(), L.ReLU()]
    return functional(*layers, L.Flatten(), L.Dense(2))


def written(value: bool | None, **options: Any) -> Any:
    inputs = keras.Input((4,))
    kind = tn.BatchNormalization if options else L.BatchNormalization
    layer = kind(name="bn", **options)
    x = layer(inputs) if value is None else layer(inputs, training=value)
    return keras.Model(inputs, L.Dense(1)(x))


class Passing(Forgetful):
    """As advised: the argument is there."""

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.last(self.bn(self.first(x), training=training))


def subclassed(kind: type[Forgetful]) -> Any:
    model = kind()
    model(X[:2])
    return model


def recompiled(again: bool) -> Any:
    model = chain()
    model.compile("sgd", "mse")
    model.get_layer("bn1").trainable = False
    if again:
        model.compile("sgd", "mse")
    return model


def parent(trainable: bool) -> Any:
    base = keras.Sequential([keras.Input((4,)), L.BatchNormalization(name="bn")], name="base")
    base.trainable = trainable
    return keras.Sequential([keras.Input((4,)), base, L.Dense(1)])


def cut(off: bool) -> Any:
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="bn")(inputs)
    return keras.Model(inputs, L.Dense(1)(keras.ops.stop_gradient(x) if off else x))


SEQUENCES = np.stack([DATA, 3 * DATA + 9, DATA - 5], axis=1)
CONSTANT = np.concatenate([DATA[:, :3], np.full((len(DATA), 1), 7.0, "float32")], axis=1)
BY_SOURCE = [X[np.argsort(X[:, 0])][i : i + 16] for i in range(0, 256, 16)]
MIXED = [X[i : i + 16] for i in range(0, 256, 16)]

ADVISED = [
    Fault("TN106", lambda: wide(1e13), "keras.layers.Normalization() before the model",
          lambda: wide(1.0)),
    Fault("TN108", small, "model.fit(x, y, batch_size=16)", small, DATA[:160], {"batch_size": 4}),
    Fault("TN108", lambda: small(tn.BatchNormalization(virtual_batch_size=4)),
          "tn.BatchNormalization(virtual_batch_size=16)",
          lambda: small(tn.BatchNormalization(virtual_batch_size=16)), DATA, {"batch_size": 40}),
    Fault("TN111", small, "shuffle the samples, all of them, before they are cut into batches",
          small, BY_SOURCE),
    Fault("TN201", lambda: narrow(6, 2), "filters=4, or a lower regularization",
          lambda: narrow(4, 0)),
    Fault("TN202", on_a_tiny_scale, "train with keras.layers.BatchNormalization(epsilon=1e-05)",
          lambda: on_a_tiny_scale(1e-5)),
    Fault("TN202", small, "leave out the channels that never vary: columns of the data, filters "
          "before it", lambda: keras.Sequential([keras.Input((3,)), L.BatchNormalization()]),
          CONSTANT),
    Fault("TN203", lambda: steep(5.0), ASK, lambda: steep(1.0)),
    Fault("TN204", lambda: small(L.BatchNormalization(gamma_regularizer="l2")),
          "keras.layers.BatchNormalization(gamma_regularizer=None)",
          lambda: small(L.BatchNormalization(gamma_regularizer=None))),
    Fault("TN204", stepped, "a new optimizer, with optimizer.exclude_from_weight_decay("
          'var_names=["gamma", "beta"]) before its first step', spared),
    Fault("TN205", lambda: small(L.BatchNormalization(gamma_initializer="zeros")),
          'keras.layers.BatchNormalization(gamma_initializer="ones")',
          lambda: small(L.BatchNormalization(gamma_initializer="ones"))),
    Fault("TN206", lambda: biased(True), "keras.layers.Conv2D(…, use_bias=False)",
          lambda: biased(False)),
    Fault("TN301", planted.forgotten, "tn.BatchNormalization()(x) after it", complete),
    Fault("TN302", planted.dropped, ASK, lambda: planted.dropped(late=True)),
    Fault("TN305", planted.wrong_axis, "keras.layers.BatchNormalization(axis=3)",
          lambda: planted.wrong_axis(3)),
    Fault("TN306", lambda: of_two(True), "keras.layers.BatchNormalization() for each use, or one "
          "tn.BatchNormalization(domains=2)",
          lambda: of_two(False)),
    Fault("TN307", lambda: of_two(True), "keras.layers.BatchNormalization() for each use, or one "
          "tn.BatchNormalization(domains=2)",
          lambda: of_two(False), [DATA, 3 * DATA + 9], {"batch_size": 320}),
    Fault("TN307", lambda: over_time(True), "keras.layers.BatchNormalization() on the whole "
          "sequence, without TimeDistributed", lambda: over_time(False), SEQUENCES),
    Fault("TN307", lambda: recurrent(L.BatchNormalization(name="bn")),
          "keras.layers.LayerNormalization() in its place: a cell is called at each step",
          lambda: recurrent(L.LayerNormalization()), SEQUENCES),
    Fault("TN308", lambda: accumulating(4),
          'model = tn.replace(model, to="truenorm", accumulation_steps=4).model',
          lambda: gathering(4)),
    Fault("TN401", lambda: subclassed(Forgetful), "def call(self, inputs, training=None)",
          lambda: subclassed(Passing), X),
    Fault("TN402", lambda: recompiled(False),
          "trainable as it was at compile, or tn.freeze, tn.unfreeze", lambda: recompiled(True)),
    Fault("TN403", lambda: parent(False),
          "model.get_layer('base').trainable = True, and model.compile(…) after it",
          lambda: parent(True)),
    Fault("TN405", lambda: written(True), "layer(x) without training=", lambda: written(None)),
    Fault("TN406", lambda: written(False, freeze="statistics"),
          "layer(x) without training=: its freeze policy holds them",
          lambda: written(None, freeze="statistics")),
    Fault("TN409", lambda: cut(True), "tn.inspect(model, x, y)", lambda: cut(False)),
    Fault("TN501", lambda: functional(conv(), L.ReLU(), L.BatchNormalization(name="bn"),
                                      conv(activation="relu")),
          'model = tn.place(model, "before_activation").model, trained anew',
          lambda: functional(conv(), L.BatchNormalization(name="bn"), L.ReLU(),
                             conv(activation="relu"))),
]  # fmt: skip


def wide(variance: float) -> Any:
    model = small(tn.BatchNormalization(name="bn"))
    model.get_layer("bn").moving_variance.assign([variance] * 4)
    return model


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # Keras sees it as well
@pytest.mark.parametrize("fault", ADVISED, ids=lambda f: f"{f.code}: {f.remedy[:30]}")
def test_a_model_made_as_advised_has_not_the_fault(fault: Fault) -> None:
    assert fault.remedy in found(fault, fault.build()).values()
    assert fault.advised is not None
    mended = Fault(fault.code, fault.advised, "", None, fault.data, dict(fault.options))
    if fault.code == "TN108" and "batch_size=16" in fault.remedy[:31]:
        mended.options["batch_size"] = 16
    if fault.code == "TN111":
        mended.data = MIXED
    if fault.data is CONSTANT:
        mended.data = CONSTANT[:, :3]
    assert not found(mended, mended.build())


def test_every_rules_remedy_is_applied_here() -> None:
    cases = [*STATISTICS, *((f.code,) for f in (*CALLED, *PLACED, *ADVISED)), ("TN407",)]
    assert {case[0] for case in cases} == {rule.code for rule in RULES}
