"""replace, place and fold: how many sites, what the receipt says, and that functions are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from small_models import (
    dense,
    inputs_for,
    nested,
    predict,
    residual,
    shake,
    snapshot,
    subclassed,
    two_towers,
)

import truenorm as tn
import truenorm._rewrites.fold

MODELS = [dense, residual, nested, two_towers]
KINDS = ["keras", "truenorm"]


def classes(model: Any) -> list[str]:
    return [type(layer).__name__ for layer in model.layers]


def assert_same_outputs(a: Any, b: Any, x: Any, rtol: float = 1e-5) -> None:
    for ours, theirs in zip(predict(a, x), predict(b, x), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * scale)


# --- replace -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize(("kind", "to"), [("keras", "truenorm"), ("truenorm", "keras")])
def test_replace_keeps_outputs_and_weights(build: Callable[..., Any], kind: str, to: str) -> None:
    model = shake(build(kind))
    before, x = snapshot(model), inputs_for(model)
    rewrite = tn.replace(model, to=to)
    assert not rewrite.left
    assert rewrite.max_rel_error is not None
    assert rewrite.max_rel_error <= 1e-5
    assert_same_outputs(rewrite.model, model, x)
    for ours, theirs in zip(rewrite.model.weights, model.weights, strict=True):
        assert ours.path == theirs.path
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert snapshot(model) == before


def test_replace_leaves_what_is_there_already_and_what_is_somebodys_own() -> None:
    class Mine(keras.layers.BatchNormalization):
        pass

    inputs = keras.Input((3,))
    x = Mine(name="mine")(tn.BatchNormalization(name="ours")(inputs))
    receipt = tn.replace(keras.Model(inputs, x), to="truenorm")
    assert [(k.path, k.reason) for k in receipt.left] == [
        ("ours", "it is truenorm's already"),
        ("mine", "its class Mine is a custom subclass"),
    ]


def test_the_replaced_model_is_a_plain_keras_file(tmp_path: Path) -> None:
    model = tn.replace(shake(residual("truenorm")), to="keras").model
    model.save(tmp_path / "plain.keras")
    text = keras.models.model_from_json(model.to_json()).to_json()
    assert "truenorm" not in text


def test_frozen_layers_stay_frozen() -> None:
    model = residual()
    model.get_layer("a_bn").trainable = False
    new = tn.replace(model, to="truenorm").model
    flags = {layer.name: layer.trainable for layer in new.layers if "bn" in layer.name}
    assert flags == {"stem_bn": True, "a_bn": False, "b_bn": True, "c_bn": True}


def test_a_policy_that_a_config_leaves_out_is_carried_over() -> None:
    """Keras writes into that of SpatialDropout the dtype of variables only."""
    layers = [L.SpatialDropout1D(0.5, dtype="mixed_bfloat16"), L.BatchNormalization()]
    model = keras.Sequential([keras.Input((4, 3)), *layers])
    new = tn.replace(model, to="truenorm").model
    assert new.layers[0].compute_dtype == "bfloat16"


# --- place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_place_moves_behind_the_activation_and_says_what_it_left(kind: str) -> None:
    model = shake(residual(kind))
    before = snapshot(model)
    rewrite = tn.place(model, "after_activation")
    assert [c.path for c in rewrite.changed] == ["stem_bn", "a_bn", "c_bn"]
    assert [(k.path, k.reason) for k in rewrite.left] == [
        ("b_bn", "not directly followed by an activation, but by Add add")
    ]
    names = [layer.name for layer in rewrite.model.layers]
    assert names.index("stem_relu") < names.index("stem_bn")
    assert names.index("b_conv") < names.index("b_bn")
    assert snapshot(model) == before


def test_a_moved_batch_normalization_sees_the_activations_output() -> None:
    """By hand in float64: dense, ReLU, then the normalisation with the old values."""
    model = shake(dense())
    x = inputs_for(model)
    moved = tn.place(model, "after_activation").model
    hidden, batch_norm, head = (model.get_layer(n) for n in ("hidden", "bn", "head"))
    kernel, bias = (np.float64(w.numpy()) for w in hidden.weights)
    gamma, beta, mean, variance = (np.float64(w.numpy()) for w in batch_norm.weights)
    h = np.maximum(x @ kernel + bias, 0)
    h = (h - mean) / np.sqrt(variance + batch_norm.epsilon) * gamma + beta
    kernel, bias = (np.float64(w.numpy()) for w in head.weights)
    np.testing.assert_allclose(predict(moved, x)[0], h @ kernel + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [dense, residual, nested])
def test_there_and_back_is_the_same_model(build: Callable[..., Any]) -> None:
    model = shake(build())
    there = tn.place(model, "after_activation").model
    back = tn.place(there, "before_activation").model
    assert back.get_config() == model.get_config()
    assert_same_outputs(back, model, inputs_for(model), rtol=0)


def test_none_removes_every_site_and_gives_the_bias() -> None:
    rewrite = tn.place(shake(residual(use_bias=False)), "none")
    assert len(rewrite.changed) == 4
    assert "BatchNormalization" not in classes(rewrite.model)
    for name in ("stem_conv", "a_conv", "b_conv", "c_conv"):
        layer = rewrite.model.get_layer(name)
        assert layer.use_bias
        np.testing.assert_array_equal(layer.bias.numpy(), np.zeros(4))
    with pytest.raises(tn.ModelError, match=r"^This model has no BatchNormalization"):
        tn.place(rewrite.model, "none")


@pytest.mark.parametrize("where", ["*a_bn", lambda site: site.path == "a_bn"])
def test_only_the_sites_asked_for(where: Any) -> None:
    rewrite = tn.place(residual(), "after_activation", where=where)
    assert [c.path for c in rewrite.changed] == ["a_bn"]
    assert ("stem_bn", "not selected") in [(k.path, k.reason) for k in rewrite.left]


def test_an_activation_inside_the_dense_layer_is_split_out() -> None:
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, activation="relu", name="d"),
         keras.layers.BatchNormalization(name="bn")]
    )  # fmt: skip
    rewrite = tn.place(model, "before_activation")
    assert classes(rewrite.model) == ["Dense", "BatchNormalization", "Activation"]
    assert rewrite.model.get_layer("d").activation is keras.activations.linear
    assert rewrite.changed[0].what == "moved before 'relu', split out of Dense d"


@pytest.mark.parametrize("position", ["none", "before_activation", "after_activation"])
def test_a_moved_model_trains(position: Any) -> None:
    model = residual("truenorm")
    model.compile("adam", "mse")
    moved = tn.place(model, position).model
    x = inputs_for(model)
    losses = moved.fit(x, np.ones((8, 3)), epochs=12, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_a_shared_batch_normalization_is_not_moved() -> None:
    rewrite = tn.place(two_towers(), "after_activation")
    assert {k.reason for k in rewrite.left} == {"it or its activation is called more than once"}


# --- fold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [dense, residual, nested])
def test_fold_removes_every_site_and_keeps_the_function(
    build: Callable[..., Any], kind: str
) -> None:
    model = shake(build(kind))
    before, x = snapshot(model), inputs_for(model)
    rewrite = tn.fold(model)
    assert not rewrite.left
    assert "BatchNormalization" not in str(rewrite.model.get_config())
    assert_same_outputs(rewrite.model, model, x)
    assert snapshot(model) == before


L = keras.layers
FOLDABLE = {
    "dense": ((5,), L.Dense(4)),
    "dense without bias": ((5,), L.Dense(4, use_bias=False)),
    "dense on sequences": ((7, 5), L.Dense(4)),
    "conv1d": ((8, 3), L.Conv1D(4, 3)),
    "conv2d": ((6, 6, 3), L.Conv2D(4, 3, strides=2, padding="same", use_bias=False)),
    "conv3d": ((4, 4, 4, 2), L.Conv3D(3, 2)),
    "dilated": ((8, 8, 3), L.Conv2D(4, 3, dilation_rate=2)),
    "grouped": ((6, 6, 4), L.Conv2D(4, 3, groups=2)),
    "depthwise1d": ((8, 3), L.DepthwiseConv1D(3, depth_multiplier=2)),
    "depthwise2d": ((6, 6, 3), L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)),
    "separable1d": ((8, 3), L.SeparableConv1D(4, 3)),
    "separable2d": ((6, 6, 3), L.SeparableConv2D(4, 3, depth_multiplier=2, use_bias=False)),
    "transposed1d": ((5, 3), L.Conv1DTranspose(4, 3)),
    "transposed2d": ((5, 5, 3), L.Conv2DTranspose(4, 3, strides=2, use_bias=False)),
    "transposed3d": ((3, 3, 3, 2), L.Conv3DTranspose(3, 2)),
}


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize(
    "flags",
    [{}, *(pytest.param({k: False}, marks=pytest.mark.any_backend) for k in ("scale", "center"))],
)
def test_fold_into_the_layer_before(name: str, flags: dict[str, bool]) -> None:
    shape, layer = FOLDABLE[name]
    layer = type(layer).from_config(layer.get_config())
    model = shake(
        keras.Sequential([keras.Input(shape), layer, L.BatchNormalization(**flags), L.ReLU()])
    )
    folded = tn.fold(model)
    assert classes(folded.model) == [type(layer).__name__, "ReLU"]
    assert_same_outputs(folded.model, model, inputs_for(model))


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((5,), L.Dense(4)),
        ((6, 6, 3), L.Conv2D(4, 3)),
        ((6, 6, 3), L.Conv2D(4, 1, padding="same", use_bias=False)),
        ((8, 3), L.Conv1D(4, 3, strides=2)),
    ],
)
def test_fold_into_the_layer_after_an_activation(shape: tuple[int, ...], layer: Any) -> None:
    layer = type(layer).from_config(layer.get_config())
    model = shake(keras.Sequential([keras.Input(shape), L.ReLU(), L.BatchNormalization(), layer]))
    folded = tn.fold(model)
    assert classes(folded.model) == ["ReLU", type(layer).__name__]
    assert_same_outputs(folded.model, model, inputs_for(model))


def left_reason(*layers: Any, shape: tuple[int, ...] = (6, 6, 3)) -> str:
    model = shake(keras.Sequential([keras.Input(shape), *layers]))
    before = snapshot(model)
    folded = tn.fold(model)
    assert snapshot(model) == before
    assert classes(folded.model) == classes(model)
    return folded.left[0].reason


def test_a_padded_convolution_after_it_does_not_take_it() -> None:
    reason = left_reason(L.ReLU(), L.BatchNormalization(), L.Conv2D(2, 3, padding="same", name="c"))
    assert reason.endswith("Conv2D c pads with zeros, so that its borders would change")


def test_a_wrong_axis_is_left() -> None:
    reason = left_reason(L.Conv2D(4, 3, name="c"), L.BatchNormalization(axis=1))
    assert reason.startswith("its axis is not the channel axis of Conv2D c")


def test_an_activation_in_the_layer_before_is_left() -> None:
    reason = left_reason(L.Conv2D(4, 3, activation="relu", name="c"), L.BatchNormalization())
    assert reason.startswith("Conv2D c has an activation")


@pytest.mark.parametrize("variance", [-1.0, np.nan])
def test_a_stored_variance_that_cannot_be_is_left(variance: float) -> None:
    model = shake(dense())
    model.get_layer("bn").moving_variance.assign(np.full(6, variance))
    folded = tn.fold(model)
    assert folded.left[0].reason == ("its moving statistics, gamma or beta are not finite numbers")


def test_a_shared_site_is_left() -> None:
    assert {k.reason for k in tn.fold(two_towers()).left} == {"it is called more than once"}


def test_a_shared_convolution_is_left() -> None:
    left, right = keras.Input((6, 6, 3)), keras.Input((6, 6, 3))
    conv = L.Conv2D(4, 3, name="conv")
    outputs = [L.ReLU()(L.BatchNormalization()(conv(x))) for x in (left, right)]
    reasons = [site.reason for site in tn.fold(keras.Model([left, right], outputs)).left]
    assert len(reasons) == 2
    assert all(reason.startswith("Conv2D conv is called more than once") for reason in reasons)


def test_a_second_consumer_of_the_convolution_is_left() -> None:
    inputs = keras.Input((6, 6, 3))
    conv = L.Conv2D(3, 3, padding="same", name="c")(inputs)
    model = keras.Model(inputs, L.Add(name="add")([conv, L.BatchNormalization()(conv)]))
    reason = tn.fold(model).left[0].reason
    assert reason == "Conv2D c has other consumers too; its output goes to Add add"


def test_a_rewrite_that_would_change_the_function_gives_no_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault in the arithmetic must not pass the verification."""
    wrong = truenorm._rewrites.fold.Affine(np.ones(6), np.ones(6), 1)
    monkeypatch.setattr("truenorm._rewrites.fold.affine_of", lambda _: wrong)
    model = shake(dense())
    before = snapshot(model)
    with pytest.raises(tn.VerificationError, match=r"^Folding would change what the model"):
        tn.fold(model)
    assert snapshot(model) == before


# --- all three ---------------------------------------------------------------------------------

TOOLS = [
    lambda model: tn.replace(model, to="truenorm"),
    lambda model: tn.place(model, "after_activation"),
    tn.fold,
]


@pytest.mark.parametrize("tool", TOOLS[1:])
def test_a_subclassed_model_is_refused_and_unchanged(tool: Callable[[Any], Any]) -> None:
    model = subclassed()
    before = snapshot(model)
    with pytest.raises(tn.ModelError, match="This model is subclassed"):
        tool(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("tool", [*TOOLS, tn.inspect])
def test_a_model_without_batch_normalization_is_refused(tool: Callable[[Any], Any]) -> None:
    message = (
        r"^This model has no BatchNormalization \(at 'plain'\)\. Expected: at least one "
        r"BatchNormalization layer\. Received: 1 layer, none of that kind\.$"
    )
    with pytest.raises(tn.ModelError, match=message):
        tool(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain"))


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(tn.OptionError, match=r"Expected: 'none' or 'before_activation' or"):
        tn.place(dense(), "behind")  # pyright: ignore[reportArgumentType]
    with pytest.raises(tn.OptionError, match=r"Received: 'torch'\.$"):
        tn.replace(dense(), to="torch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(tn.OptionError, match=r"a path pattern, a predicate on a Site, or None"):
        tn.place(dense(), "none", where=3)  # pyright: ignore[reportArgumentType]


def test_a_site_inside_a_wrapper_is_replaced_and_not_moved() -> None:
    inputs = keras.Input((4, 5, 3))
    x = keras.layers.TimeDistributed(keras.layers.BatchNormalization(name="bn"), name="each")(
        inputs
    )
    x = keras.layers.BatchNormalization(name="outer")(x)
    model = keras.Model(inputs, x)
    assert [c.path for c in tn.replace(model, to="truenorm").changed] == ["outer", "each/bn"]
    assert [site.path for site in tn.place(model, "after_activation").left] == ["outer", "each/bn"]


def chaotic(x: Any) -> Any:
    for _ in range(4):
        x = keras.layers.Dense(16, kernel_initializer=keras.initializers.RandomNormal(0, 1.0))(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.ops.sin(2.0 * x)
    return x


def test_a_model_that_amplifies_rounding_is_still_folded() -> None:
    """What one unit in the last place of the input does to the model is no fault of folding."""
    inputs = keras.Input((16,))
    rewrite = tn.fold(shake(keras.Model(inputs, chaotic(inputs))))
    assert rewrite.max_rel_error is not None
    assert rewrite.max_rel_error > 1e-4
    assert len(rewrite.changed) == 4


def test_a_chaotic_output_does_not_excuse_another(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = keras.Input((16,))
    wild = keras.ops.sin(1e9 * chaotic(inputs))
    calm = keras.layers.BatchNormalization()(keras.layers.Dense(16)(inputs))
    model = shake(keras.Model(inputs, [wild, calm]))
    right = truenorm._rewrites.fold.affine_of

    def wrong(layer: Any) -> Any:
        affine = right(layer)
        return replace(affine, shift=affine.shift + 5)

    monkeypatch.setattr(truenorm._rewrites.fold, "affine_of", wrong)
    with pytest.raises(tn.VerificationError, match=r"^Folding would change what the model"):
        tn.fold(model)


# --- what surrounds a site ---------------------------------------------------------------------


def test_an_output_activation_stays_the_output() -> None:
    model = keras.Sequential(
        [keras.Input((3,)), L.Dense(2), L.BatchNormalization(), L.Activation("softmax", name="p")]
    )
    (left,) = tn.place(model, "after_activation").left
    assert left.reason == "Activation p is an output of the model, and must stay one"


def test_a_moved_site_keeps_its_training_argument() -> None:
    inputs = keras.Input((3,))
    x = L.BatchNormalization(name="bn")(L.Dense(2)(inputs), training=True)
    model = keras.Model(inputs, L.Dense(1)(L.ReLU()(x)))
    moved = tn.place(model, "after_activation").model
    assert tn.inspect(model).modes["model(x)"][0].statistics == "batch"
    assert tn.inspect(moved).modes["model(x)"][0].statistics == "batch"


def test_a_site_with_a_mask_of_its_own_is_not_moved() -> None:
    inputs, keep = keras.Input((4, 3)), keras.Input((4,), dtype="bool")
    x = L.ReLU()(L.BatchNormalization(name="bn")(L.Dense(2)(inputs), mask=keep))
    (left,) = tn.place(keras.Model([inputs, keep], L.Dense(1)(x)), "after_activation").left
    assert left.reason == "it is called with mask, which belongs to its old input"


def test_a_class_of_somebodys_own_is_not_folded_or_collected() -> None:
    class Mine(L.BatchNormalization):
        def call(self, inputs: Any, training: bool | None = None) -> Any:
            return super().call(keras.ops.relu(inputs), training=training)

    model = keras.Sequential([keras.Input((3,)), L.Dense(2), Mine(name="bn")])
    assert tn.fold(model).left[0].reason == "its class Mine is a custom subclass"
    assert tn.inspect(model).modes["predict"][0].statistics == "neither"
    with pytest.raises(tn.ModelError, match="What a custom subclass of BatchN"):
        tn.recalibrate(model, np.zeros((4, 3), "float32"))


def test_activations_without_a_name_do_no_harm() -> None:
    model = keras.Sequential(
        [keras.Input((3,)), L.Dense(2, activation=L.LeakyReLU()), L.BatchNormalization()]
    )
    assert tn.fold(model).left[0].reason.endswith("its output goes to nothing: it is an output")
    assert tn.inspect(model).sites[0].position == "after_activation"


def test_open_dimensions_get_a_size_that_the_model_can_take() -> None:
    x = inputs = keras.Input((None, None, 3))
    for _ in range(5):
        x = L.Conv2D(2, 3, strides=2)(x)
    model = shake(keras.Model(inputs, L.BatchNormalization()(x)))
    assert len(tn.fold(model).changed) == 1
    assert len(tn.replace(model, to="truenorm").changed) == 1


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_other_dtypes_are_folded_within_their_precision(policy: str) -> None:
    if policy == "float64" and keras.config.backend() == "jax":
        policy = "mixed_bfloat16"  # JAX has no float64 unless the user enables it
    inner = keras.Sequential(
        [keras.Input((5,)), L.Dense(8, dtype=policy), L.BatchNormalization(dtype=policy)]
    )
    model = shake(keras.Sequential([keras.Input((5,)), inner, L.Dense(2)]))
    assert len(tn.fold(model).changed) == 1


def test_an_activation_inside_the_layer_stays_when_it_is_folded() -> None:
    model = shake(keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(6, name="hidden"),
         tn.BatchNormalization(activation="silu", name="bn"), keras.layers.Dense(3, name="head")]
    ))  # fmt: skip
    folded, x = tn.fold(model).model, inputs_for(model)
    assert [type(layer).__name__ for layer in folded.layers] == ["Dense", "Activation", "Dense"]
    np.testing.assert_allclose(predict(folded, x)[0], predict(model, x)[0], rtol=1e-4, atol=1e-5)
    own = tn.BatchNormalization(activation="relu", name="bn")
    behind = keras.Sequential([keras.Input((5,)), keras.layers.ReLU(), own, keras.layers.Dense(3)])
    (left,) = tn.fold(behind).left
    assert left.reason.endswith("its own activation is behind it")
