"""Remedies of wrong statistics mend the outputs, and leave what learned with its statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import test_diagnosis_rules as planted
from applied import Forgetful, X, Y, apply, outputs, small
from test_diagnosis_rules import DATA, chain, set_statistics, statistics

import truenorm as tn

L = keras.layers
RECALIBRATE = "tn.recalibrate(model, data)"


# --- statistics: the loss against the model with the true ones -----------------------------------


def with_statistics(change: Callable[[Any], None]) -> Callable[[], Any]:
    def build() -> Any:
        model = chain()
        model.compile("sgd", "mse")
        change(model)
        return model

    return build


def untouched(model: Any) -> None:
    set_statistics(model.get_layer("bn2"), np.zeros(6), np.ones(6))


def begun(model: Any) -> None:
    for name in ("bn1", "bn2"):
        planted.forget(model.get_layer(name), 0.5)


def shifted(model: Any) -> None:
    planted.shift(model.get_layer("bn2"), 0.5)


def of_another_domain(model: Any) -> None:
    mean, variance = statistics(model.get_layer("bn1"))
    set_statistics(model.get_layer("bn1"), mean + 9.0, 4 * variance)


def negative(model: Any) -> None:
    set_statistics(model.get_layer("bn1"), np.zeros(4), [-1, 1, 1, 1])


def tiny(model: Any) -> None:
    set_statistics(model.get_layer("bn2"), np.zeros(6), [1e-6, *[1] * 5])
    model.get_layer("bn2").gamma.assign([5, 1, 1, 1, 1, 1])


def scaled(model: Any) -> None:
    mean, variance = statistics(model.get_layer("bn1"))
    set_statistics(model.get_layer("bn1"), mean, variance * np.array([16, 1, 16, 1]))


STATISTICS = [
    ("TN101", untouched),
    ("TN102", begun),
    ("TN103", shifted),
    ("TN104", of_another_domain),
    ("TN105", negative),
    ("TN109", scaled),
    ("TN110", scaled),
    ("TN203", tiny),
]


def loss(model: Any, y: np.ndarray) -> float:
    error = float(np.square(outputs(model, DATA) - y).mean())
    return error if np.isfinite(error) else np.inf


@pytest.mark.parametrize("labelled", [False, pytest.param(True, marks=pytest.mark.any_backend)])
@pytest.mark.parametrize(
    ("code", "change"),
    [STATISTICS[0], *(pytest.param(*one, marks=pytest.mark.any_backend) for one in STATISTICS[1:])],
)
def test_statistics_of_the_data_mend(code: str, change: Any, labelled: bool) -> None:
    model = with_statistics(change)()
    right = chain()
    if code == "TN203":
        right.get_layer("bn2").gamma.assign(model.get_layer("bn2").gamma)
    y = outputs(right, DATA)
    y = y + 0.01 * np.random.default_rng(1).normal(size=y.shape)
    labels, before = (y if labelled else None), loss(model, y)
    diagnosis = tn.diagnose(model, DATA, labels, select=code, batch_size=80)
    assert {f.remedy for f in diagnosis.findings} == {RECALIBRATE}
    model = apply(RECALIBRATE, model, DATA)
    assert not tn.diagnose(model, DATA, labels, select=code, batch_size=80).findings
    assert loss(model, y) < before / 5


def rectified(depth: int = 6) -> Any:
    """Skewed values all the way: a batch's own statistics upstream are not the population's."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,))])
    for index in range(depth):
        model.add(L.Dense(16, activation="relu"))
        model.add(L.BatchNormalization(name=f"bn{index}"))
    return model


@pytest.mark.any_backend
def test_where_batches_are_small_the_population_upstream_mends_or_larger_ones() -> None:
    """TN109."""
    model = rectified()
    data = np.random.default_rng(0).gamma(1.0, 2.0, (384, 8)).astype("float32")

    def remedies(size: int) -> list[str]:
        diagnosis = tn.diagnose(model, data, select="TN109", batch_size=size)
        return list(dict.fromkeys(f.remedy for f in diagnosis.findings))

    population = 'tn.recalibrate(model, data, upstream="population")'
    tn.recalibrate(model, data, batch_size=8)
    assert remedies(8) == [population]
    apply(population, model, data)
    assert remedies(8) == []
    assert remedies(3) == ["model.fit(x, y, batch_size=16)"]  # no statistics help there
    assert remedies(16) == []


# --- networks that learned in inference mode ------------------------------------------------------


def forgetful() -> Any:
    model = Forgetful()
    model(X[:2])
    return model


def around(layer: Any) -> Any:
    hidden = L.Dense(16, activation="tanh")
    return keras.Sequential([keras.Input((4,)), hidden, layer, L.Dense(1)])


def frozen() -> Any:
    return around(L.BatchNormalization(name="bn", trainable=False))


def held_by_policy() -> Any:
    return around(tn.BatchNormalization(name="bn", freeze="statistics"))


def half_frozen() -> Any:
    """A base that stays as it was, and a head that learns from batches."""
    base = keras.Sequential(
        [keras.Input((4,)), L.Dense(16, activation="tanh"), L.BatchNormalization(name="bn")],
        name="base",
    )
    base.trainable = False
    head = [L.Dense(16, activation="tanh"), L.BatchNormalization(name="bn"), L.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), base, *head])
    model.layers[0].layers[-1].moving_mean.assign(np.full(16, 0.5))
    return model


def learned(build: Callable[[], Any]) -> Any:
    keras.utils.set_random_seed(0)
    model = build()
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(X, Y, batch_size=64, epochs=25, verbose=0)
    return model


def score(model: Any) -> float:
    return float(np.square(outputs(model, X) - Y).mean())


CALLS = ("tn.", "model = ", "model.optimizer")


@pytest.mark.any_backend
@pytest.mark.parametrize("thawed", [False, True])
@pytest.mark.parametrize("build", [forgetful, frozen, held_by_policy])
def test_what_learned_with_its_statistics_keeps_them(build: Any, thawed: bool) -> None:
    model = learned(build)
    if thawed and build is not forgetful:
        tn.unfreeze(model)
    before = score(model)
    assert before < 0.2
    recalibrated = tn.recalibrate(model, X)
    assert score(model) > 1.5 * before  # this is what must not be advised
    recalibrated.undo()
    for data, y in ((None, None), (X, None), (X, Y)):
        diagnosis = tn.diagnose(model, data, y, batch_size=32)
        remedies = {f.code: f.remedy for f in diagnosis.findings if f.code[2] in "14"}
        assert not [code for code, remedy in remedies.items() if "recalibrate" in remedy]
        for remedy in remedies.values():
            if remedy.startswith(CALLS):
                model = apply(remedy, model, X, Y)
                assert score(model) <= before * (1 + 1e-4)
        if y is not None and not thawed:  # with labels all is known
            assert not {code for code in remedies if code.startswith("TN1")}


@pytest.mark.any_backend
def test_a_head_is_mended_and_the_base_left() -> None:
    model = learned(half_frozen)
    head, base = model.get_layer("bn"), model.layers[0].layers[-1]
    kept = statistics(base)
    mean, variance = statistics(head)
    set_statistics(head, mean + 2 * np.sqrt(variance), variance)
    before = score(model)
    diagnosis = tn.diagnose(model, X, Y, select="TN1", batch_size=64)
    remedies = {(f.code, f.site): f.remedy for f in diagnosis.findings}
    name = model.name
    assert remedies == {
        ("TN103", "bn"): "tn.recalibrate(model, data, layers='bn')",
        ("TN110", name): "tn.recalibrate(model, data, layers='bn')",
    }
    apply(remedies["TN103", "bn"], model, X)
    assert not tn.diagnose(model, X, Y, select="TN1", batch_size=64).findings
    assert score(model) < before / 2
    np.testing.assert_array_equal(statistics(base), kept)


@pytest.mark.any_backend
def test_of_several_layers_those_that_learn_are_named() -> None:
    norms = [L.BatchNormalization(name=f"bn{i}") for i in range(4)]
    back = keras.Sequential([keras.Input((4,)), *norms[:2]], name="back")
    front = keras.Sequential([keras.Input((4,)), *norms[2:]], name="front")
    back.trainable = False
    model = keras.Sequential([keras.Input((4,)), back, front, L.Dense(1)])
    remedy = tn.diagnose(model, select="TN101").findings[0].remedy
    assert remedy == "tn.recalibrate(model, data, layers='front/*')"
    back.trainable = True
    norms[0].trainable = norms[2].trainable = False
    remedy = tn.diagnose(model, select="TN101").findings[0].remedy
    assert remedy == "tn.recalibrate(model, data, layers=lambda layer: layer.trainable)"
    apply(remedy, model, X)
    moved = [bool(np.any(keras.ops.convert_to_numpy(k.moving_mean))) for k in norms]
    assert moved == [False, True, False, True]
    assert not tn.diagnose(model, select="TN101").findings


@pytest.mark.any_backend
def test_a_custom_class_is_not_recalibrated() -> None:
    class Mine(L.BatchNormalization):
        pass

    mine, stock = Mine(name="mine"), L.BatchNormalization(name="stock")
    model = keras.Sequential([keras.Input((4,)), stock, mine, L.Dense(1)])
    mine.moving_variance.assign([-1.0] * 4)
    stock.moving_variance.assign([-1.0] * 4)
    found = {f.site: f.remedy for f in tn.diagnose(model, select="TN105").findings}
    assert found["stock"] == "tn.recalibrate(model, data, layers='stock')"
    assert found["mine"].startswith("set its moving statistics")
    apply(found["stock"], model, X)
    assert [f.site for f in tn.diagnose(model, select="TN105").findings] == ["mine"]


@pytest.mark.any_backend
def test_batches_that_help_are_mended_by_freezing_late() -> None:
    """TN110: a network that reads the label off its batch; no statistics can help it."""
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(16, 32, 4)).astype("float32")
    offsets = generator.normal(0.0, 3.0, (16, 1, 1))
    y = (x[..., :1] + 0 * offsets).reshape(-1, 1)
    x = (x + offsets).astype("float32").reshape(-1, 4)
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 512, 32)]
    model = small(tn.BatchNormalization(name="bn", momentum=0.9))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    for _ in range(30):
        for one in batches:
            model.train_on_batch(*one)
    (finding,) = tn.diagnose(model, batches, select="TN110").findings
    expected = "tn.callbacks.FreezeStatistics(after_epoch=…) in model.fit, for its last epochs"
    assert finding.remedy == expected
    before = float(np.square(outputs(model, x) - y).mean())
    late = tn.callbacks.FreezeStatistics(after_epoch=0)
    model.fit(x, y, epochs=30, batch_size=32, callbacks=[late], verbose=0)
    assert float(np.square(outputs(model, x) - y).mean()) < before / 2
    tn.freeze(model, "statistics")
    assert not tn.diagnose(model, batches, select="TN110").findings
