"""Every rule of diagnose: a model with the fault, and one without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from diagnosed import conv, dropped, functional, only, set_statistics
from small_models import dense, nested, residual, shake, subclassed, two_towers

import truenorm as tn
from truenorm._cli.remedies import in_commands
from truenorm._diagnosis.table import RULES

pytestmark = pytest.mark.any_backend

L = keras.layers
GENERATOR = np.random.default_rng(5)
DATA = GENERATOR.normal(1.0, 2.0, (640, 4)).astype("float32")
KERNELS = [GENERATOR.normal(size=shape).astype("float32") for shape in ((4, 6), (6, 1))]


def chain() -> Any:
    """BatchNormalization, dense, BatchNormalization, ReLU, dense; exact statistics of DATA."""
    model = keras.Sequential(
        [keras.Input((4,)), L.BatchNormalization(name="bn1"),
         L.Dense(6, use_bias=False, name="hidden"), L.BatchNormalization(name="bn2"), L.ReLU(),
         L.Dense(1, name="head")], name="chain",
    )  # fmt: skip
    for name, kernel in zip(("hidden", "head"), KERNELS, strict=True):
        model.get_layer(name).kernel.assign(kernel)
    first, second = model.get_layer("bn1"), model.get_layer("bn2")
    x = np.float64(DATA)
    set_statistics(first, x.mean(0), x.var(0))
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + first.epsilon) @ KERNELS[0]
    set_statistics(second, x.mean(0), x.var(0))
    return model


def statistics(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    return tuple(  # type: ignore[return-value]
        np.float64(keras.ops.convert_to_numpy(v))
        for v in (layer.moving_mean, layer.moving_variance)
    )


def codes(diagnosis: tn.Diagnosis) -> set[str]:
    return {finding.code for finding in diagnosis.findings}


def forget(layer: Any, share: float) -> None:
    """As if so much of the initial values were still in the moving average."""
    mean, variance = statistics(layer)
    set_statistics(layer, (1 - share) * mean, share + (1 - share) * variance)


def shift(layer: Any, by: float) -> None:
    """Means off by so many standard deviations, in directions that lead nowhere."""
    mean, variance = statistics(layer)
    signs = np.where(np.arange(len(mean)) % 2, by, -by)
    set_statistics(layer, mean + signs * np.sqrt(variance), variance)


def test_a_chain_with_true_statistics_has_no_finding_above_a_note() -> None:
    diagnosis = tn.diagnose(chain(), DATA, batch_size=80, ignore=["TN107", "TN4"])
    assert diagnosis.findings == ()
    assert diagnosis.skipped == ()
    assert diagnosis.clean


def test_statistics_never_updated() -> None:
    model = chain()
    set_statistics(model.get_layer("bn2"), np.zeros(6), np.ones(6))
    finding = only(tn.diagnose(model, select="TN101"))
    assert finding.site == "bn2"
    assert finding.remedy == "tn.recalibrate(model, data)"
    with_data = only(tn.diagnose(model, DATA, select="TN101", batch_size=320))
    assert with_data.evidence["output_error"] > 0.3


def test_initial_values_still_in_the_statistics() -> None:
    model = chain()
    forget(model.get_layer("bn1"), 0.3)
    forget(model.get_layer("bn2"), 0.6)
    found = tn.diagnose(model, DATA, select=["TN102", "TN103", "TN104"], batch_size=320).findings
    assert [(f.code, f.site) for f in found] == [("TN102", "bn1"), ("TN102", "bn2")]
    assert [f.evidence["initial_share"] for f in found] == pytest.approx([0.3, 0.6], abs=0.02)


def test_stale_statistics() -> None:
    model = chain()
    shift(model.get_layer("bn2"), 0.5)
    finding = only(tn.diagnose(model, DATA, select=["TN102", "TN103", "TN104"], batch_size=320))
    assert (finding.code, finding.site) == ("TN103", "bn2")
    assert finding.evidence["mean_off_by_std"] == pytest.approx(0.5, rel=0.02)
    assert finding.evidence["output_error"] == pytest.approx(0.5, rel=0.02)


def test_data_of_another_domain() -> None:
    other = 2 * DATA + np.array([5, -5, 3, -3], "float32")
    found = tn.diagnose(chain(), other, select=["TN102", "TN103", "TN104"], batch_size=320).findings
    assert [(f.code, f.site) for f in found] == [("TN104", "bn1")]
    assert found[0].evidence["scale_off_by_doublings"] == pytest.approx(1, abs=0.01)


def test_statistics_that_are_no_numbers() -> None:
    model = chain()
    set_statistics(model.get_layer("bn1"), [np.nan, 0, 0, 0], [1, -1, np.inf, 1])
    finding = only(tn.diagnose(model, select="TN105"))
    assert finding.severity == "error"
    counted = {"nan": 1, "infinite": 1, "negative_variances": 1, "channels": 4, "which": "0, 1, 2"}
    assert finding.evidence == counted


def test_statistics_out_of_precisions_reach() -> None:
    model = chain()
    set_statistics(model.get_layer("bn1"), [5e3, 0, 0, 0], [1, 1, 1, 1])
    set_statistics(model.get_layer("bn2"), np.zeros(6), [1e13, *[1] * 5])
    found = tn.diagnose(model, select="TN106").findings
    assert [(f.site, f.evidence["out_of_reach"]) for f in found] == [("bn1", 1), ("bn2", 1)]
    assert found[0].evidence["mean_in_std"] == pytest.approx(5e3, rel=1e-3)
    assert not tn.diagnose(chain(), select="TN106").findings


def test_batches_too_small() -> None:
    finding = tn.diagnose(chain(), DATA[:160], select="TN108", batch_size=4).findings[0]
    assert finding.evidence["independent_values_per_batch"] == pytest.approx(4, rel=0.3)
    assert finding.evidence["samples_per_batch"] == 4


def test_ghost_batches_too_small() -> None:
    ghosts = tn.BatchNormalization(virtual_batch_size=4, name="ghosts")
    model = keras.Sequential([keras.Input((4,)), ghosts, L.BatchNormalization(), L.Dense(1)])
    finding = only(tn.diagnose(model, DATA, select="TN108", batch_size=40))
    assert finding.site == "ghosts"
    assert finding.evidence["independent_values_per_batch"] == pytest.approx(4, rel=0.5)


def test_sorted_data_has_the_batches_of_training() -> None:
    ordered = DATA[np.argsort(DATA[:, 0])]
    assert not tn.diagnose(chain(), ordered, select="TN108", batch_size=32).findings


def in_batches(data: np.ndarray, size: int) -> list[np.ndarray]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def test_batches_that_are_no_random_samples() -> None:
    ordered = DATA[np.argsort(DATA[:, 0])]
    finding = only(tn.diagnose(chain(), in_batches(ordered, 32), select="TN111"))
    assert finding.site == "bn1"
    assert finding.remedy.startswith("shuffle the samples")
    # One channel of four is sorted: its batch means vary as its values do, the others by 1 / 32.
    assert finding.evidence["batch_means_vary_by_std"] == pytest.approx(0.52, rel=0.1)
    assert finding.evidence["mixed_they_would_by"] == pytest.approx(32**-0.5, rel=0.3)


@pytest.mark.parametrize("size", [2, 4, 32])
def test_batches_that_are_random_samples_are_no_finding(size: int) -> None:
    assert not tn.diagnose(chain(), in_batches(DATA, size), select="TN111").findings
    ordered = DATA[np.argsort(DATA[:, 0])]  # as arrays fit shuffles them
    assert not tn.diagnose(chain(), ordered, select="TN111", batch_size=size).findings


def test_another_input_and_other_answers_in_inference() -> None:
    model = chain()
    mean, variance = statistics(model.get_layer("bn1"))
    set_statistics(model.get_layer("bn1"), mean, variance * np.array([16, 1, 16, 1]))
    model.compile("sgd", "mse", metrics=["mae"])
    good = chain()
    y = keras.ops.convert_to_numpy(good(DATA)) + 0.1 * GENERATOR.normal(size=(640, 1))
    skewed, worse = tn.diagnose(model, DATA, y, select=["TN109", "TN110"], batch_size=160).findings
    assert (skewed.code, skewed.site) == ("TN109", "bn2")
    assert (worse.code, worse.site) == ("TN110", "chain")
    loss = {key: worse.evidence[f"loss_{key}"] for key in ("in_training", "in_inference")}
    assert loss["in_inference"] > 2 * loss["in_training"]
    assert worse.evidence["loss_recalibrated"] < loss["in_inference"]
    assert worse.evidence["mae_in_inference"] > worse.evidence["mae_recalibrated"]
    good.compile("sgd", "mse")
    assert not tn.diagnose(good, DATA, y, select=["TN109", "TN110"], batch_size=160).findings
    only(tn.diagnose(model, DATA, select="TN110", batch_size=320))  # without labels by the outputs


# --- parameters --------------------------------------------------------------------------------


def dead_gamma() -> Any:
    model = chain()
    model.get_layer("bn2").gamma.assign([1e-4, 1, 1, 1, 1, 1])
    return model


def large_scale() -> Any:
    model = chain()
    set_statistics(model.get_layer("bn2"), np.zeros(6), [1e-6, *[1] * 5])
    model.get_layer("bn2").gamma.assign([5, 1, 1, 1, 1, 1])
    return model


def constant() -> Any:
    model = chain()
    set_statistics(model.get_layer("bn2"), np.zeros(6), [1e-6, *[1] * 5])
    return model


def regularized() -> Any:
    batch_norm = L.BatchNormalization(name="bn", gamma_regularizer="l2")
    return keras.Sequential([keras.Input((4,)), batch_norm, L.Dense(1)])


def decayed() -> Any:
    model = chain()
    model.compile(keras.optimizers.AdamW(weight_decay=1e-4), "mse")
    return model


def spared() -> Any:
    optimizer = keras.optimizers.AdamW(weight_decay=1e-4)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    model = chain()
    model.compile(optimizer, "mse")
    return model


def zero() -> Any:
    batch_norm = L.BatchNormalization(name="bn", gamma_initializer="zeros")
    return keras.Sequential([keras.Input((4,)), batch_norm, L.Dense(1)])


# --- structure ---------------------------------------------------------------------------------


def forgotten() -> Any:
    norm = L.BatchNormalization
    return functional(
        conv(), norm(), L.ReLU(), conv("lonely"), L.ReLU(), conv(), norm(), L.ReLU(),
        conv(), norm(), L.Flatten(), L.Dense(2),
    )  # fmt: skip


def gated() -> Any:
    """Squeeze and excitation: its dense layers have no BatchNormalization, and need none."""
    inputs = keras.Input((6, 6, 3))
    x = L.BatchNormalization()(conv()(inputs))
    gate = L.Dense(4, activation="sigmoid")(L.Dense(2)(L.GlobalAveragePooling2D()(x)))
    x = L.BatchNormalization()(conv()(x * L.Reshape((1, 1, 4))(gate)))
    x = L.BatchNormalization()(conv()(x))
    return keras.Model(inputs, L.Dense(2)(x))


def twice() -> Any:
    first, second = L.BatchNormalization(name="a"), L.BatchNormalization(name="b")
    return functional(conv(), first, second, L.Flatten(), L.Dense(1))


def on_output(*after: Any) -> Any:
    return functional(L.Dense(3), L.BatchNormalization(name="bn"), *after, shape=(4,))


def wrong_axis(axis: int = 1) -> Any:
    batch_norm = L.BatchNormalization(axis=axis, name="bn")
    return functional(conv(), L.ReLU(), batch_norm, L.Flatten(), L.Dense(1))


def accumulating(steps: int = 4) -> Any:
    model = chain()
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=steps), "mse")
    return model


def mixed() -> Any:
    norm = L.BatchNormalization
    return functional(conv(), norm(), L.ReLU(), conv(), L.ReLU(), norm(), L.Flatten(), L.Dense(1))


# code, with the fault, site, without it
PLAIN: list[tuple[str, Callable[[], Any], str, Callable[[], Any]]] = [
    ("TN201", dead_gamma, "bn2", chain),
    ("TN202", constant, "bn2", chain),
    ("TN203", large_scale, "bn2", chain),
    ("TN204", regularized, "bn", chain),
    ("TN204", decayed, "bn1", spared),
    ("TN205", zero, "bn", chain),
    ("TN206", lambda: shake(dense()), "bn", lambda: residual(use_bias=False)),
    ("TN301", forgotten, "lonely", residual),
    ("TN301", forgotten, "lonely", gated),
    ("TN302", dropped, "bn", lambda: dropped(late=True)),
    ("TN302", dropped, "bn", lambda: dropped(depth=True)),
    ("TN303", twice, "b", residual),
    ("TN304", on_output, "bn", residual),
    ("TN304", lambda: on_output(L.Softmax()), "bn", lambda: on_output(L.ReLU())),
    ("TN305", wrong_axis, "bn", lambda: wrong_axis(-1)),
    ("TN306", two_towers, "bn", residual),
    ("TN308", accumulating, "chain", lambda: accumulating(None)),  # type: ignore[arg-type]
    ("TN309", mixed, "model", residual),
    ("TN501", lambda: functional(L.ReLU(), L.BatchNormalization(name="bn")), "bn", nested),
]


@pytest.mark.parametrize(("code", "faulty", "site", "healthy"), PLAIN)
def test_without_data(
    code: str, faulty: Callable[[], Any], site: str, healthy: Callable[[], Any]
) -> None:
    found = tn.diagnose(faulty(), select=code).findings
    assert {f.code for f in found} == {code}
    assert found[0].site == site
    assert found[0].evidence
    assert not tn.diagnose(healthy(), select=code).findings


def test_channels_with_a_fault_are_named() -> None:
    x = DATA[:, [0, 1, 2, 3] * 3].copy()
    x[:, [1, 3, 4, 6, 8, 9, 11]] = 7.0
    model = keras.Sequential([keras.Input((12,)), L.BatchNormalization(name="bn"), L.Dense(1)])
    layer = model.get_layer("bn")
    layer.gamma.assign([1.0, 0.0, *[1.0] * 10])
    layer.moving_variance.assign([1e-6] * 2 + [-1.0] + [1.0] * 9)
    layer.gamma.assign([5.0, 0.0, *[1.0] * 10])
    found = {f.code: f.evidence for f in tn.diagnose(model, x, select=["TN105", "TN2"]).findings}
    named = {code: evidence.get("which") for code, evidence in found.items()}
    assert named == {
        "TN105": "2", "TN201": "1", "TN202": "1, 3, 4, 6, 8, 9 and 1 more", "TN203": "0",
    }  # fmt: skip
    layer.moving_mean.assign([0.0, 1e9, *[0.0] * 10])
    assert only(tn.diagnose(model, select="TN106")).evidence["which"] == "1"
    said = str(tn.diagnose(model, x, select="TN202"))
    assert "which 1, 3, 4, 6, 8, 9 and 1 more" in " ".join(said.split())


def test_a_constant_column_of_the_data_is_seen() -> None:
    data = DATA.copy()
    data[:, 2] = 3.0
    finding = tn.diagnose(chain(), data, select="TN202", batch_size=320).findings[0]
    assert (finding.site, finding.evidence["constant"]) == ("bn1", 1)


def test_one_epsilon_is_advised_for_all_layers_and_none_that_is_rounding() -> None:
    names = ("large", "small", "nothing")
    layers = [L.BatchNormalization(name=name) for name in names]
    model = keras.Sequential([keras.Input((4,)), *layers])
    for layer, variance in zip(layers, (2e-6, 2e-8, 2e-16), strict=True):
        layer.moving_variance.assign([variance] * 4)
    found = {f.site: f.remedy for f in tn.diagnose(model, select="TN202").findings}
    smaller = "train with keras.layers.BatchNormalization(epsilon=1e-06)"
    assert (found["large"], found["small"]) == (smaller, smaller)
    assert found["nothing"].startswith("leave out the channels that never vary")


def test_one_layer_shared_by_unlike_inputs() -> None:
    left, right = keras.Input((4,)), keras.Input((4,))
    shared = L.BatchNormalization(name="bn")
    model = keras.Model([left, right], L.Dense(1)(L.Add()([shared(left), shared(right)])))
    finding = only(tn.diagnose(model, [DATA, 3 * DATA + 9], select="TN307", batch_size=320))
    assert (finding.site, finding.evidence["calls"]) == ("bn", 2)
    assert not tn.diagnose(model, [DATA, DATA[::-1]], select="TN307", batch_size=320).findings


def siamese(bn_last: bool) -> Any:
    chain = [L.Conv2D(4, 3), L.ReLU(), L.BatchNormalization(name="bn"), L.Conv2D(2, 3)]
    chain = [*chain, L.ReLU(), L.BatchNormalization(name="last")] if bn_last else chain
    encoder = keras.Sequential([keras.Input((8, 8, 1)), *chain], name="encoder")
    left, right = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    return keras.Model([left, right], L.Subtract()([encoder(left), encoder(right)]))


def test_a_shared_encoder_is_folded_by_itself() -> None:
    model = siamese(bn_last=True)
    found = {f.site: f.remedy for f in tn.diagnose(model, select="TN501").findings}
    alone = "tn.fold(model.get_layer('encoder')).model, and the model built with it"
    none = "none for it"
    assert found == {
        "encoder/bn": alone,
        "encoder/bn#2": alone,
        "encoder/last": none,
        "encoder/last#2": none,
    }
    folded = tn.fold(model.get_layer("encoder")).model
    assert not any(layer.name == "bn" for layer in folded.layers)
    assert in_commands(alone) == alone  # no command folds a part of a model


def test_what_place_leaves_is_not_to_be_placed() -> None:
    """The activation before it goes to two layers."""
    inputs = keras.Input((4,))
    z = L.ReLU()(L.Dense(4)(inputs))
    model = keras.Model(inputs, [L.BatchNormalization(name="bn")(z), L.Dense(2)(z)])
    assert [left.path for left in tn.place(model, "before_activation").left] == ["bn"]
    (finding,) = tn.diagnose(model, select="TN501").findings
    assert finding.remedy == "none for it"


def test_fold_is_advised_only_where_it_folds_another() -> None:
    relu, last = L.ReLU(), L.BatchNormalization(name="last")
    model = functional(conv(), L.BatchNormalization(name="first"), relu, last, L.ReLU())
    found = {f.site: f.remedy for f in tn.diagnose(model, select="TN501").findings}
    assert found == {"last": "none for it; tn.fold(model) folds the others"}
    assert [change.path for change in tn.fold(model).changed] == ["first"]


# --- modes -------------------------------------------------------------------------------------


def modes() -> Any:
    """One site per fault; the name says which."""
    inside = keras.Sequential([keras.Input((4,)), L.BatchNormalization(name="frozen_parent"),
                               L.BatchNormalization(name="awake")], name="parent")  # fmt: skip
    inside.trainable = False
    inside.get_layer("awake").trainable = True
    frozen = L.BatchNormalization(name="frozen", trainable=False)
    policy = tn.BatchNormalization(name="policy", freeze="affine")
    kept = tn.BatchNormalization(name="kept", freeze="statistics")
    inputs = keras.Input((4,))
    x = policy(frozen(inside(inputs)))
    x = L.BatchNormalization(name="written_true")(x, training=True)
    x = L.BatchNormalization(name="written_false")(x, training=False)
    x = L.Dense(4)(L.BatchNormalization(name="healthy")(kept(x, training=False)))
    return keras.Model(inputs, x)


def test_modes_that_surprise_are_findings() -> None:
    diagnosis = tn.diagnose(modes(), select=["TN107", "TN4"], ignore="TN409")
    assert {(f.code, f.site) for f in diagnosis.findings} == {
        ("TN107", "parent/awake"),
        ("TN107", "written_false"),
        ("TN403", "parent/frozen_parent"),
        ("TN404", "frozen"),
        ("TN405", "written_true"),
        ("TN406", "kept"),
        ("TN408", "policy"),
        ("TN408", "kept"),
    }
    assert all(f.evidence["cause"] for f in diagnosis.findings)


def test_a_call_that_takes_no_training() -> None:
    class Forgetful(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.head = L.BatchNormalization(name="bn"), L.Dense(1)

        def call(self, x: Any) -> Any:
            return self.head(self.bn(x, training=None))

    model = Forgetful()
    model(DATA)
    diagnosis = tn.diagnose(model, DATA[:8], select="TN4")
    assert {(f.code, f.site, f.severity) for f in diagnosis.findings} >= {("TN401", "bn", "error")}
    assert not tn.diagnose(subclassed(), np.zeros((8, 3), "float32"), select="TN401").findings


def test_trainable_changed_after_compile() -> None:
    model = chain()
    model.compile("sgd", "mse")
    model.get_layer("bn1").trainable = False
    found = tn.diagnose(model, select="TN402").findings
    assert [f.site for f in found] == ["bn1"]


def test_a_bare_call_that_trains() -> None:
    inputs = keras.Input((6, 6, 3))
    x = L.BatchNormalization(name="bn")(L.RandomFlip()(inputs))
    model = keras.Model(inputs, L.Dense(1)(L.GlobalAveragePooling2D()(x)))
    assert codes(tn.diagnose(model, select="TN407")) == {"TN407"}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # Keras sees it as well
def test_no_gradient() -> None:
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="bn")(inputs)
    model = keras.Model(inputs, L.Dense(1)(keras.ops.stop_gradient(x)))
    assert [f.site for f in tn.diagnose(model, select="TN409").findings] == ["bn"]


def test_every_rule_is_tested_here() -> None:
    text = Path(__file__).read_text("utf-8")
    assert not [rule.code for rule in RULES if rule.code not in text]
