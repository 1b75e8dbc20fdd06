"""replace(fuse=True): ReLU and residual sums inside the layer, proved; the tools on such models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from fused_models import check_training, projected, receipt, steps
from keras_architectures import error, images_for, model_of
from small_models import dense, inputs_for, nested, predict, residual, shake, snapshot, subclassed

import truenorm as tn
from truenorm import BatchNormalization

L = keras.layers
TAKEN = "now truenorm's BatchNormalization, with {} taken in"
NOTHING = "now truenorm's BatchNormalization; it takes nothing in: {}"


def _on_one(*values: Any) -> Any:
    """JAX takes twenty seconds to compile it."""
    return pytest.param(*values, marks=pytest.mark.any_backend)


@pytest.mark.parametrize(
    ("build", "layers"), [(projected, 11), _on_one(residual, 11), _on_one(nested, 4)], ids=[*"prn"]
)
def test_the_same_in_training_and_inference(build: Callable[[], Any], layers: int) -> None:
    model = shake(build())
    before, x = snapshot(model), inputs_for(model)
    rewrite = tn.replace(model, fuse=True)
    assert snapshot(model) == before
    assert len(rewrite.model.layers) == layers
    assert rewrite.max_rel_error is not None
    assert rewrite.max_rel_error < 1e-5
    np.testing.assert_allclose(predict(rewrite.model, x)[0], predict(model, x)[0], atol=1e-4)
    check_training(model, rewrite.model, x)


@pytest.mark.any_backend
def test_the_receipt_says_what_was_taken_in() -> None:
    model = projected()
    names = [one.name for one in model.operations if type(one).__name__ in ("Add", "ReLU")][-2:]
    assert receipt(tn.replace(model, fuse=True)) == {
        "bn": TAKEN.format("Activation relu"),
        "0_bn": NOTHING.format("BatchNormalization 3_bn takes Add sum in, and adds its output"),
        "3_bn": TAKEN.format("Add sum and ReLU out"),
        "b_bn": TAKEN.format(f"Add {names[0]} and ReLU {names[1]}"),
    }
    rewrite = tn.replace(residual(), fuse=True)
    assert rewrite.kind == "replace to truenorm, fuse=True"
    assert receipt(rewrite) == {
        "stem_bn": TAKEN.format("ReLU stem_relu"),
        "a_bn": TAKEN.format("ReLU a_relu"),
        "b_bn": TAKEN.format("Add add and ReLU add_relu"),
        "c_bn": TAKEN.format("ReLU c_relu"),
    }


def test_operations_are_taken_in() -> None:
    inputs = keras.Input((6,))
    x = keras.ops.relu(L.BatchNormalization(name="a")(inputs))
    y = L.BatchNormalization(name="b")(L.Dense(6)(x))
    x = keras.activations.relu(x + y)
    model = shake(keras.Model(inputs, L.Dense(2)(x)))
    new = tn.replace(model, fuse=True).model
    kinds = [type(layer).__name__ for layer in new.operations]
    assert kinds == ["InputLayer", "BatchNormalization", "Dense", "BatchNormalization", "Dense"]
    check_training(model, new, inputs_for(model))


def behind(*layers: Any, **options: Any) -> Any:
    """A model in which these follow a BatchNormalization."""
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="bn", **options)(L.Dense(4, name="d")(inputs))
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, L.Dense(2, name="head")(x))


def with_other_consumer() -> Any:
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="bn")(inputs)
    return keras.Model(inputs, L.Dense(2, name="head")(L.Concatenate(name="c")([x, L.ReLU()(x)])))


def output() -> Any:
    inputs = keras.Input((4,))
    return keras.Model(inputs, L.ReLU(name="relu")(L.BatchNormalization(name="bn")(inputs)))


def shared_relu() -> Any:
    inputs, relu = keras.Input((4,)), L.ReLU(name="relu")
    x = relu(L.Dense(4)(relu(L.BatchNormalization(name="bn")(inputs))))
    return keras.Model(inputs, L.Dense(2)(x))


def called_twice() -> Any:
    inputs, layer = keras.Input((4,)), L.BatchNormalization(name="bn")
    x = L.ReLU()(layer(L.Dense(4)(L.ReLU()(layer(inputs)))))
    return keras.Model(inputs, L.Dense(2)(x))


def three_added() -> Any:
    inputs = keras.Input((4,))
    x = L.Add(name="add")([L.BatchNormalization(name="bn")(inputs), inputs, L.Dense(4)(inputs)])
    return keras.Model(inputs, L.Dense(2)(L.ReLU()(x)))


def broadcast() -> Any:
    inputs = keras.Input((3, 4))
    x = L.BatchNormalization(name="bn")(inputs)
    x = L.Add(name="add")([x, L.Dense(1)(inputs)])
    return keras.Model(inputs, L.Dense(2)(L.ReLU()(x)))


def masked() -> Any:
    inputs = keras.Input((3, 4))
    x = L.BatchNormalization(name="bn")(inputs)
    x = L.Add(name="add")([x, L.Masking()(inputs)])
    return keras.Model(inputs, L.Dense(2)(L.ReLU()(x)))


def in_another_model() -> Any:
    inner_input, inputs = keras.Input((4,)), keras.Input((4,))
    inner = keras.Model(inner_input, L.BatchNormalization(name="bn")(inner_input), name="inner")
    return keras.Model(inputs, L.Dense(2)(L.ReLU(name="relu")(inner(inputs))))


class OfTheUser(L.BatchNormalization):
    """May do anything."""


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: behind(L.ReLU(6.0, name="relu")), "ReLU relu has max_value=6.0"),
        (lambda: behind(L.ReLU(negative_slope=0.1, name="r")), "ReLU r has negative_slope=0.1"),
        (lambda: behind(L.ReLU(threshold=0.5, name="r")), "ReLU r has threshold=0.5"),
        (lambda: behind(L.Activation("relu6", name="r")), "Activation r is relu6, not relu"),
        (lambda: behind(L.Activation("silu", name="r")), "Activation r is silu, not relu"),
        (lambda: behind(L.LeakyReLU(name="r")), "LeakyReLU r is no ReLU"),
        (lambda: behind(L.Dropout(0.1, name="o")), "no ReLU follows, but Dropout o"),
        (lambda: behind(L.ReLU(name="r", dtype="float64")), "ReLU r has another dtype policy"),
        (
            lambda: behind(L.Activation("relu", activity_regularizer="l2", name="r")),
            "Activation r has an activity regularizer",
        ),
        (with_other_consumer, "its output goes to ReLU re_lu, Concatenate c"),
        (output, "ReLU relu is an output of the model, and must stay one"),
        (shared_relu, "ReLU relu is called more than once"),
        (called_twice, "it is called more than once"),
        (three_added, "Add add does not add two tensors"),
        (broadcast, "Add add adds tensors of several shapes or dtypes"),
        (masked, "Add add makes one mask of several"),
        (in_another_model, "ReLU relu is in another model"),
        (subclassed, "no graph shows what follows"),
    ],
)
def test_what_cannot_be_taken_in_stays(build: Callable[[], Any], reason: str) -> None:
    keras.backend.clear_session()
    model = build()
    rewrite = tn.replace(model, fuse=True)
    assert {*receipt(rewrite).values()} == {NOTHING.format(reason)}
    if build is not subclassed:
        assert len(rewrite.model.layers) == len(model.layers)


@pytest.mark.any_backend
def test_a_layer_of_truenorm_s_takes_in_too_and_once() -> None:
    model = dense("truenorm")
    assert [left.path for left in tn.replace(model).left] == ["bn"]
    rewrite = tn.replace(model, fuse=True)
    assert receipt(rewrite) == {"bn": TAKEN.format("ReLU relu")}
    again = tn.replace(rewrite.model, fuse=True)
    inside = "it is truenorm's already; it takes nothing in: it has an activation of its own inside"
    assert [left.reason for left in again.left] == [inside]


@pytest.mark.any_backend
def test_a_layer_of_the_user_s_stays() -> None:
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="bn")(L.ReLU()(OfTheUser(name="own")(inputs)))
    rewrite = tn.replace(keras.Model(inputs, L.Dense(2)(L.ReLU(name="r")(x))), fuse=True)
    why = "its class OfTheUser is a custom subclass"
    own = f"{why}; it takes nothing in: {why}"
    assert receipt(rewrite) == {"bn": TAKEN.format("ReLU r"), "own": own}


def test_with_other_options_and_a_baked_mode() -> None:
    inputs = keras.Input((6,))
    x = L.ReLU()(L.BatchNormalization(name="a")(L.Dense(6)(inputs), training=True))
    y = L.BatchNormalization(name="b")(L.Dense(6)(x), training=True)
    model = shake(keras.Model(inputs, L.Dense(2)(L.ReLU()(L.add([y, x])))))
    new = tn.replace(model, fuse=True, bessel_correction=True).model
    x = inputs_for(model)
    np.testing.assert_allclose(predict(new, x)[0], predict(model, x)[0], atol=1e-4)
    assert [new.get_layer(name).bessel_correction for name in "ab"] == [True, True]


@pytest.mark.parametrize(
    "options", [{"virtual_batch_size": 2}, {"renorm": True}, {"synchronized": True}], ids=str
)
def test_with_options_that_take_other_statistics(options: dict[str, Any]) -> None:
    inputs = keras.Input((6,))
    x = L.ReLU()(L.add([L.BatchNormalization(name="a")(L.Dense(6)(inputs)), inputs]))
    model = shake(keras.Model(inputs, L.Dense(2)(x)))
    new = tn.replace(model, fuse=True, **options).model
    x = inputs_for(model)
    np.testing.assert_allclose(predict(new, x)[0], predict(model, x)[0], atol=1e-4)
    ((name, value),) = options.items()
    assert getattr(new.get_layer("a"), name) == value
    back = tn.replace(new, renorm=False).model if "renorm" in options else new
    assert back.get_layer("a").renorm == ("renorm" in options and back is new)


@pytest.mark.any_backend
def test_another_batchnormalization_that_cannot_take_the_sum_in_leaves_it() -> None:
    inputs = keras.Input((6,))
    a = L.BatchNormalization(name="a")(L.Dense(6)(inputs))
    b = L.BatchNormalization(name="b")(L.Dense(6)(inputs))
    outputs = L.Dense(2)(L.ReLU(name="r")(L.Add(name="sum")([a, b]))), L.Dense(2)(b)
    taken = receipt(tn.replace(shake(keras.Model(inputs, outputs)), fuse=True))
    assert "Add sum" in taken["a"]
    assert "takes nothing in: its output goes to" in taken["b"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_other_dtypes(policy: str) -> None:
    inputs = keras.Input((6, 6, 3), dtype="float32")
    x = L.Conv2D(4, 3, padding="same", dtype=policy)(inputs)
    x = L.ReLU(dtype=policy)(L.BatchNormalization(dtype=policy)(x))
    y = L.BatchNormalization(dtype=policy)(L.Conv2D(4, 3, padding="same", dtype=policy)(x))
    x = L.ReLU(dtype=policy)(L.Add(dtype=policy)([y, x]))
    model = shake(keras.Model(inputs, L.GlobalAveragePooling2D(dtype=policy)(x)))
    rewrite = tn.replace(model, fuse=True)
    assert len(rewrite.model.layers) == len(model.layers) - 3
    x = inputs_for(model)
    np.testing.assert_allclose(predict(rewrite.model, x)[0], predict(model, x)[0], rtol=0.05)


@pytest.mark.parametrize("method", ["_normalize_batch", "_normalize_moving"])
@pytest.mark.parametrize("fault", ["sum", "ReLU"])
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, method: str, fault: str) -> None:
    right = getattr(BatchNormalization, method)

    def wrong(self: Any, inputs: Any, mask: Any, weights: Any, add: Any = None) -> Any:
        if fault == "sum":
            return right(self, inputs, mask, weights)
        activation, self.__dict__["activation"] = self.activation, None
        try:
            return right(self, inputs, mask, weights, add)
        finally:
            self.__dict__["activation"] = activation

    monkeypatch.setattr(BatchNormalization, method, wrong)
    where = "add_relu" if fault == "sum" else "stem_relu"
    with pytest.raises(tn.VerificationError, match=f"(?s)Replacing would change.*'{where}'"):
        tn.replace(shake(residual()), fuse=True)


def test_only_truenorm_s_layer_takes_in() -> None:
    with pytest.raises(tn.OptionError, match="Only truenorm's layer takes a ReLU in"):
        tn.replace(residual(), to="keras", fuse=True)


# --- the other tools -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model, and the same with everything taken in."""
    model = shake(projected())
    return model, tn.replace(model, fuse=True).model


def test_folding_puts_back_what_was_taken_in(pair: tuple[Any, Any]) -> None:
    model, new = pair
    rewrite = tn.fold(new)
    assert rewrite.left == ()
    assert len(rewrite.changed) == 4
    kinds = [type(layer).__name__ for layer in rewrite.model.layers]
    assert kinds.count("Add") == 2
    assert "BatchNormalization" not in kinds
    x = inputs_for(model)
    np.testing.assert_allclose(predict(rewrite.model, x)[0], predict(model, x)[0], atol=1e-4)
    part = tn.fold(new, where="3_bn")
    assert [change.path for change in part.changed] == ["3_bn"]
    np.testing.assert_allclose(predict(part.model, x)[0], predict(model, x)[0], atol=1e-4)


def test_a_site_that_cannot_be_folded_becomes_keras_s_with_its_sum() -> None:
    inputs = keras.Input((6, 6, 3))
    y = L.BatchNormalization(name="bn")(L.ReLU()(inputs))
    model = shake(keras.Model(inputs, L.Flatten()(L.ReLU()(L.Add()([y, inputs])))))
    rewrite = tn.fold(tn.replace(model, fuse=True).model)
    (left,) = rewrite.left
    assert "what it adds comes behind it" in left.reason or "activation" in left.reason
    assert type(rewrite.model.get_layer("bn")) is L.BatchNormalization
    x = inputs_for(model)
    np.testing.assert_allclose(predict(rewrite.model, x)[0], predict(model, x)[0], atol=1e-5)


@pytest.mark.any_backend
def test_what_is_added_takes_no_map_in() -> None:
    """A BatchNormalization is not folded through what another one adds."""
    inputs = keras.Input((6,))
    added = L.BatchNormalization(name="a")(L.ReLU()(inputs))
    x = BatchNormalization(name="b", activation="relu")(L.Dense(6)(inputs), add=added)
    model = shake(keras.Model(inputs, L.Dense(2)(x)))
    rewrite = tn.fold(model)
    assert {left.path: left.reason for left in rewrite.left}["a"].endswith(
        "BatchNormalization b takes its output besides another input"
    )
    x = inputs_for(model)
    np.testing.assert_allclose(predict(rewrite.model, x)[0], predict(model, x)[0], atol=1e-5)


@pytest.mark.any_backend
def test_placing_leaves_them(pair: tuple[Any, Any]) -> None:
    for position in ("none", "after_activation", "before_layer"):
        rewrite = tn.place(pair[1], position)
        fused = {left.path: left.reason for left in rewrite.left}
        assert fused["3_bn"] == "it has an activation of its own inside"
    inputs = keras.Input((6,))
    model = keras.Model(inputs, L.Dense(2)(BatchNormalization(name="bn")(inputs, add=inputs)))
    (left,) = tn.place(model, "none").left
    assert left.reason == "it adds a tensor to what it normalises"


def test_statistics_are_those_of_the_separate_layers(pair: tuple[Any, Any]) -> None:
    model, new = pair
    x = inputs_for(model, samples=32)
    old, own = (tn.collect(one, x, batch_size=8) for one in (model, new))
    assert {*old.sites} == {*own.sites}
    for path in old.sites:
        np.testing.assert_allclose(own.sites[path].mean, old.sites[path].mean, atol=1e-4)
    done = [tn.recalibrate(one, x, batch_size=8) for one in pair]
    np.testing.assert_allclose(predict(new, x)[0], predict(model, x)[0], atol=1e-4)
    for recalibration in done:
        recalibration.undo()


@pytest.mark.any_backend
def test_inspect_shows_what_is_inside(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """In the table, in HTML, in JSON, and read from the file; nothing where there is nothing."""
    model, new = pair
    found = tn.inspect(new)
    assert {site.path: (site.activation, site.adds) for site in found.sites} == {
        "bn": ("relu", False), "0_bn": (None, False), "3_bn": ("relu", True),
        "b_bn": ("relu", True),
    }  # fmt: skip
    where = found.tables()[0]
    cells = {row[0]: row[where.columns.index("inside")] for row in where.rows}
    assert cells == {"bn": "relu", "0_bn": "–", "3_bn": "add and relu", "b_bn": "add and relu"}
    assert "add and relu" in str(found)
    assert "add and relu" in found._repr_html_()
    assert found.to_dict()["sites"][2]["adds"] is True
    assert tn.Inspection.from_json(found.to_json()) == found
    assert "inside" not in tn.inspect(model).tables()[0].columns
    layer = BatchNormalization(activation=lambda x: keras.ops.sin(x), name="own")
    assert tn.inspect(keras.Sequential([keras.Input((2,)), layer])).sites[0].activation == (
        "<lambda>"
    )
    new.save(tmp_path / "new.keras")
    stored = tn.archive.read(tmp_path / "new.keras")
    assert {one.path: one.activation for one in stored.layers} == {
        "bn": "relu", "0_bn": None, "3_bn": "relu", "b_bn": "relu",
    }  # fmt: skip
    assert "inside" in stored.tables()[0].columns


@pytest.mark.any_backend
def test_modes_and_findings(pair: tuple[Any, Any]) -> None:
    model, new = pair
    x = inputs_for(model)
    modes = [tn.inspect(one).to_dict()["modes"] for one in (new, model)]
    assert modes[0] == modes[1]
    codes = [{f.code for f in tn.diagnose(m, x).findings} for m in (new, model)]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("load", [keras.saving.load_model, tn.archive.load], ids=["keras", "ours"])
def test_files(pair: tuple[Any, Any], load: Any, tmp_path: Path) -> None:
    pair[1].save(tmp_path / "model.keras")
    x = inputs_for(pair[0])
    loaded = load(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(loaded, x)[0], predict(pair[1], x)[0])
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in pair[1].layers]


@pytest.mark.long
@pytest.mark.any_backend
def test_resnet50() -> None:
    model = model_of("ResNet50")
    rewrite = tn.replace(model, fuse=True)
    said = [what.partition(" taken in")[0] for what in receipt(rewrite).values()]
    assert sum("with Add" in one for one in said) == 16
    assert sum("with Activation" in one for one in said) == 33
    assert len(rewrite.changed) == 53
    assert len(rewrite.model.layers) == len(model.layers) - 65
    assert error(rewrite.model, "ResNet50") < 1e-4
    stock = keras.models.clone_model(model)
    stock.set_weights(model.get_weights())
    x = images_for("ResNet50")
    losses, of_stock = steps(stock, x, 2)
    apart, weights = steps(tn.replace(model).model, x, 2)
    own, own_weights = steps(rewrite.model, x, 2)
    np.testing.assert_allclose(own[0], losses[0], rtol=1e-5)
    np.testing.assert_allclose(own, apart, rtol=1e-5)
    # So deep a model amplifies rounding, and XLA rounds otherwise where it joins other operations:
    # by no more than the same layers, apart, differ from Keras's.
    for name, values in weights.items():
        rounding = np.abs(values - of_stock[name]).max()
        atol = max(rounding, 1e-4 * np.abs(values).max())
        np.testing.assert_allclose(own_weights[name], values, atol=atol, err_msg=name)
