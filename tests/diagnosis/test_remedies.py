"""Every remedy that diagnose prints, applied to the fault: it mends, and it never harms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
import test_diagnosis_rules as planted
from test_diagnosis_rules import DATA, chain, conv, functional, set_statistics, statistics

import truenorm as tn
from truenorm._diagnosis.table import RULES

L = keras.layers
RECALIBRATE = "tn.recalibrate(model, data)"
ASK = "tn.diagnose(model, data, y)"
IMAGES = np.random.default_rng(2).normal(1.0, 2.0, (64, 6, 6, 3)).astype("float32")


@dataclass
class Fault:
    """A model with a fault.

    Args:
        code: Of the rule that finds it.
        build: Makes the model.
        remedy: What the finding says.
        advised: Where that is no call: makes the model as advised.
        data: What it is diagnosed with.
        options: Of the diagnosis.
    """

    code: str
    build: Callable[[], Any]
    remedy: str
    advised: Callable[[], Any] | None = None
    data: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def found(fault: Fault, model: Any) -> dict[str, str]:
    """The remedy by the site; nothing where there is no BatchNormalization any more."""
    if not any(isinstance(k, L.BatchNormalization) for k in model._flatten_layers()):
        return {}
    diagnosis = tn.diagnose(model, fault.data, select=fault.code, **fault.options)
    assert diagnosis.checked == (fault.code,)
    return {finding.site: finding.remedy for finding in diagnosis.findings}


def apply(remedy: str, model: Any, data: Any, y: Any = None) -> Any:
    """Make the calls as they are printed; gives the model that they leave."""
    names = {"tn": tn, "keras": keras, "model": model, "data": data, "y": y}
    exec(remedy, names)  # noqa: S102
    return names["model"]


def outputs(model: Any, x: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(model(x, training=False)))


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


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("code", "change"), STATISTICS)
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

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(3.0, 2.0, (256, 4)).astype("float32")
Y = (np.tanh(X[:, :1] - 3) + 0.5 * X[:, 1:2]).astype("float32")


class Forgetful(keras.Model):
    """Its ``call`` takes no ``training``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = L.Dense(16, activation="tanh"), L.Dense(1)
        self.bn = L.BatchNormalization(name="bn")

    def call(self, x: Any) -> Any:
        return self.last(self.bn(self.first(x), training=None))


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


HOLD = 'tn.freeze(model, "statistics", layers={!r})'
REPLACE = 'model = tn.replace(model, to="truenorm").model'
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


# --- advice for the next model --------------------------------------------------------------------


def small(batch_norm: Any = None) -> Any:
    layer = batch_norm or L.BatchNormalization(name="bn")
    return keras.Sequential([keras.Input((4,)), layer, L.Dense(1)])


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


def flipped() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = L.BatchNormalization(name="bn")(L.RandomFlip()(inputs))
    return keras.Model(inputs, L.Dense(1)(L.GlobalAveragePooling2D()(x)))


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
    Fault("TN302", planted.dropped, "keras.layers.Dropout after the last of them",
          lambda: planted.dropped(late=True)),
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


def test_a_bare_call_is_mended_at_the_call() -> None:
    """TN407: the remedy is how to call it."""
    model = flipped()
    (finding,) = tn.diagnose(model, select="TN407").findings
    assert finding.remedy == "model(x, training=False)"
    with tn.observe(model) as seen:
        apply(finding.remedy.replace("x", "data"), model, IMAGES)
    assert seen.modes["bn"].statistics == "moving"


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


def test_every_rules_remedy_is_applied_here() -> None:
    cases = [*STATISTICS, *((f.code,) for f in (*CALLED, *PLACED, *ADVISED)), ("TN407",)]
    assert {case[0] for case in cases} == {rule.code for rule in RULES}
