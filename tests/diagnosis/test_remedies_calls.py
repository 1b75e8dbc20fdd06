"""Remedies that are calls: they mend, and keep what the model computes or let it learn as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import test_diagnosis_rules as planted
from applied import Fault, apply, found, outputs
from test_diagnosis_rules import chain, conv, functional, set_statistics

import truenorm as tn

pytestmark = pytest.mark.any_backend
L = keras.layers
IMAGES = np.random.default_rng(2).normal(1.0, 2.0, (64, 6, 6, 3)).astype("float32")
REPLACE = 'model = tn.replace(model, to="truenorm").model'

# --- calls on the model: the function is kept -----------------------------------------------------


def far() -> Any:
    model = chain()
    set_statistics(model.get_layer("bn1"), [5e3, 0, 0, 0], [1, 1, 1, 1])
    return model


def overridden(kind: Any) -> Callable[[], Any]:
    def build() -> Any:
        inputs = keras.Input((4,))
        x = kind(name="bn")(inputs, training=False)
        return keras.Model(inputs, L.Dense(1)(x))

    return build


def awake(wrapped: bool) -> Callable[[], Any]:
    """A layer that was made trainable again in a frozen parent, in a wrapper or not."""

    def build() -> Any:
        layer = L.BatchNormalization(name="bn")
        inside: Any = L.TimeDistributed(layer, name="each") if wrapped else layer
        shape = (3, 4) if wrapped else (4,)
        parent = keras.Sequential([keras.Input(shape), inside], name="parent")
        parent.trainable = False
        layer.trainable = True
        return keras.Sequential([keras.Input(shape), parent, L.Flatten(), L.Dense(1)])

    return build


def decayed_anew() -> Any:
    return planted.decayed()


def mode(name: str) -> Callable[[], Any]:
    """Of the model with one site per fault, the one."""

    def build() -> Any:
        inputs = keras.Input((4,))
        if name == "frozen":
            x = L.BatchNormalization(name=name, trainable=False)(inputs)
        else:
            x = tn.BatchNormalization(name=name, freeze="affine")(inputs)
        return keras.Model(inputs, L.Dense(1)(L.BatchNormalization(name="other")(x)))

    return build


CALLED = [
    Fault("TN106", far, REPLACE),
    Fault("TN107", overridden(tn.BatchNormalization),
          'tn.freeze(model, "statistics", layers=\'bn\')'),
    Fault("TN107", overridden(L.BatchNormalization),
          f'{REPLACE}; tn.freeze(model, "statistics", layers=\'bn\')'),
    Fault("TN107", awake(False),
          f'{REPLACE}; tn.freeze(model, "statistics", layers=\'parent/bn\')'),
    Fault("TN107", awake(True),
          f'{REPLACE}; tn.freeze(model, "statistics", layers=\'parent/each/bn\')'),
    Fault("TN204", decayed_anew,
          'model.optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])'),
    Fault("TN303", planted.twice, "model = tn.fold(model, where='b').model"),
    Fault("TN304", planted.on_output, "model = tn.fold(model, where='bn').model"),
    Fault("TN404", mode("frozen"), "tn.unfreeze(model, layers='frozen')"),
    Fault("TN408", mode("policy"), "tn.unfreeze(model, layers='policy')"),
]  # fmt: skip


@pytest.mark.parametrize("fault", CALLED, ids=lambda f: f"{f.code}-{f.build.__name__}")
def test_a_call_mends_and_keeps_what_the_model_computes(fault: Fault) -> None:
    model = fault.build()
    x = np.random.default_rng(4).normal(size=(8, *model.input_shape[1:])).astype("float32")
    before = outputs(model, x)
    remedies = found(fault, model)
    assert set(remedies.values()) == {fault.remedy}
    model = apply(fault.remedy, model, x)
    assert not found(fault, model)
    np.testing.assert_allclose(outputs(model, x), before, rtol=1e-4, atol=1e-4)
    others = [layer for layer in model.layers if layer.name == "other"]
    assert all(layer.trainable for layer in others)


def test_an_activation_inside_stays_where_the_layer_goes() -> None:
    """Neither fold nor place takes such a layer away here."""
    inputs = keras.Input((4,))
    x = L.ReLU()(L.Dense(3)(inputs))
    model = keras.Model(inputs, tn.BatchNormalization(activation="tanh", name="bn")(x))
    (finding,) = tn.diagnose(model, select="TN304").findings
    assert finding.remedy == "keras.layers.Activation('tanh') in its place"


# --- calls that make another model, which is to be trained ----------------------------------------


def unfoldable() -> Any:
    """On the output behind an activation: nothing takes it in."""
    return functional(L.Dense(3, activation="relu"), L.BatchNormalization(name="bn"), shape=(4,))


def behind() -> Any:
    norm = L.BatchNormalization
    return functional(conv(), L.ReLU(), norm(name="bn"), conv(), L.ReLU(), norm(), L.Flatten(),
                      L.Dense(1))  # fmt: skip


PLACED = [
    Fault("TN304", unfoldable, "model = tn.place(model, \"none\", where='bn').model"),
    Fault("TN309", planted.mixed, 'model = tn.place(model, "before_activation").model'),
    Fault("TN501", behind, 'model = tn.place(model, "before_activation").model, trained anew'),
]


@pytest.mark.parametrize("fault", PLACED, ids=lambda f: f"{f.code}-{f.build.__name__}")
def test_another_place_mends_and_learns_as_well(fault: Fault) -> None:
    keras.utils.set_random_seed(0)
    model = fault.build()
    x = np.random.default_rng(4).normal(size=(64, *model.input_shape[1:])).astype("float32")
    y = np.tanh(x.reshape(64, -1)[:, : model.output_shape[-1]])
    kept = outputs(model, x)
    remedies = found(fault, model)
    assert fault.remedy in remedies.values()
    new = apply(fault.remedy.removesuffix(", trained anew"), model, x)
    assert not set(found(fault, new)) & {s for s, r in remedies.items() if r == fault.remedy}
    np.testing.assert_array_equal(outputs(model, x), kept)  # the model given is as it was
    for one in (model, new):
        one.compile(keras.optimizers.Adam(0.01), "mse")
    losses = [one.fit(x, y, epochs=20, verbose=0).history["loss"] for one in (model, new)]
    assert losses[1][-1] < losses[1][0]
    assert losses[1][-1] < 1.5 * losses[0][-1]


# --- how the model is called ---------------------------------------------------------------------


def flipped() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = L.BatchNormalization(name="bn")(L.RandomFlip()(inputs))
    return keras.Model(inputs, L.Dense(1)(L.GlobalAveragePooling2D()(x)))


def test_a_bare_call_is_mended_at_the_call() -> None:
    """TN407: the remedy is how to call it."""
    model = flipped()
    (finding,) = tn.diagnose(model, select="TN407").findings
    assert finding.remedy == "model(x, training=False)"
    with tn.observe(model) as seen:
        apply(finding.remedy.replace("x", "data"), model, IMAGES)
    assert seen.modes["bn"].statistics == "moving"
