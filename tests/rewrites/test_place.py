"""place: functions as activations, pre-activation, insertion and removal, and what is left."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from small_models import inputs_for, predict, shake, snapshot, two_towers

import truenorm as tn
from truenorm._model.graph import calls
from truenorm._model.sites import describe, site_calls
from truenorm._study.checks import check_placement

pytestmark = pytest.mark.any_backend
L = keras.layers


def names(model: Any) -> list[str]:
    """Layers and operations in the order of execution."""
    return [call.operation.name for call in calls(model)]


def positions(model: Any) -> list[str | None]:
    return [describe(call).position for call in site_calls(model)[0]]


# --- functions ---------------------------------------------------------------------------------

FUNCTIONS = [
    keras.ops.relu, keras.activations.relu, keras.activations.silu, keras.activations.gelu,
    keras.ops.leaky_relu, keras.ops.tanh, keras.ops.hard_sigmoid, keras.activations.softplus,
]  # fmt: skip


def functions() -> Any:
    """Dense, BatchNormalization and a function that is no layer, for several functions."""
    x = inputs = keras.Input((5,))
    for function in FUNCTIONS:
        x = function(L.BatchNormalization()(L.Dense(4)(x)))
    return keras.Model(inputs, L.Dense(2)(x))


def test_functions_are_activations_there_and_back() -> None:
    model = shake(functions())
    before, x = snapshot(model), inputs_for(model)
    assert positions(model) == ["before_activation"] * len(FUNCTIONS)
    there = tn.place(model, "after_activation")
    assert not there.left
    assert positions(there.model) == ["after_activation"] * len(FUNCTIONS)
    back = tn.place(there.model, "before_activation").model
    assert back.get_config() == model.get_config()
    for ours, theirs in zip(predict(back, x), predict(model, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert snapshot(model) == before


def test_a_function_keeps_its_settings_and_sees_the_dense_layers_output() -> None:
    """By hand in float64: dense, leaky ReLU, then the normalisation."""
    inputs = keras.Input((5,))
    x = L.BatchNormalization(name="bn")(L.Dense(4, name="d")(inputs))
    model = shake(keras.Model(inputs, L.Identity()(keras.ops.leaky_relu(x, negative_slope=0.5))))
    x = inputs_for(model)
    kernel, bias = (np.float64(w.numpy()) for w in model.get_layer("d").weights)
    gamma, beta, mean, variance = (np.float64(w.numpy()) for w in model.get_layer("bn").weights)
    h = x @ kernel + bias
    h = (np.where(h > 0, h, h / 2) - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    moved = tn.place(model, "after_activation").model
    np.testing.assert_allclose(predict(moved, x)[0], h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function", [keras.ops.exp, keras.ops.softmax, keras.activations.glu, lambda x: 2.0 * x]
)
def test_arithmetic_is_no_activation(function: Any) -> None:
    inputs = keras.Input((5,))
    x = function(L.BatchNormalization()(L.Dense(4)(inputs)))
    model = keras.Model(inputs, L.Dense(2)(x))
    assert positions(model) == [None]
    left = tn.place(model, "after_activation").left
    assert [k.reason.split(", but by ")[0] for k in left] == [
        "not directly followed by an activation"
    ]


# --- activations inside layers -----------------------------------------------------------------

LINEAR = [
    (L.Conv1D(3, 3, use_bias=False), (6, 2)), (L.Conv2D(3, 3), (6, 6, 2)),
    (L.Conv2DTranspose(3, 2), (4, 4, 2)), (L.DepthwiseConv2D(3), (6, 6, 2)),
    (L.SeparableConv1D(3, 3), (6, 2)), (L.Dense(3), (5,)),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "shape"), LINEAR)
def test_split_out_and_merged_back(layer: Any, shape: tuple[int, ...]) -> None:
    changes = {"name": "linear", "activation": "silu"}
    layer = type(layer).from_config({**layer.get_config(), **changes})
    model = shake(
        keras.Sequential([keras.Input(shape), layer, L.BatchNormalization(name="bn"), L.Dense(2)])
    )
    there = tn.place(model, "before_activation").model
    assert names(there)[:3] == ["linear", "bn", "linear_activation"]
    assert positions(there) == ["before_activation"]
    back = tn.place(there, "after_activation")
    assert back.changed[0].what.endswith(f", merged into {type(layer).__name__} linear")
    assert back.model.get_config() == model.get_config()
    x = inputs_for(model)
    np.testing.assert_array_equal(predict(back.model, x)[0], predict(model, x)[0])
    again = tn.place(back.model, "before_activation").model
    assert again.get_config() == there.get_config()


@pytest.mark.parametrize("inside", [L.LeakyReLU(0.3), L.PReLU()])
def test_an_activation_layer_inside_a_dense_layer_is_split_out(inside: Any) -> None:
    """By hand in float64; the new layer is not the old model's, and has its numbers."""
    inside = type(inside).from_config(inside.get_config())
    dense = L.Dense(3, activation=inside, name="d")
    model = keras.Sequential([keras.Input((4,)), dense, L.BatchNormalization(name="bn")])
    assert "d_activation" in names(tn.place(model, "before_activation").model)
    x = inputs_for(model)
    predict(model, x)  # a PReLU inside has its weights from here on
    slope: Any = 0.3
    for alpha in inside.weights:
        slope = np.array([0.1, 0.2, 0.3])
        alpha.assign(slope)
    before = snapshot(model)
    moved = tn.place(model, "before_activation").model
    assert names(moved) == ["d", "bn", "d_activation"]
    assert type(moved.get_layer("d_activation")) is type(inside)
    h = x @ np.float64(model.get_weights()[0]) / np.sqrt(1 + 1e-3)
    expected = np.where(h > 0, h, h * slope)
    np.testing.assert_allclose(predict(moved, x)[0], expected, rtol=1e-4, atol=1e-5)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "activation",
    [L.ReLU(6.0), L.LeakyReLU(0.1), L.PReLU(shared_axes=[1]), L.ELU(0.7), L.Activation("mish")],
)
def test_every_activation_layer_there_and_back(activation: Any) -> None:
    activation = type(activation).from_config({**activation.get_config(), "name": "act"})
    model = shake(
        keras.Sequential([keras.Input((4, 2)), L.Conv1D(3, 2), L.BatchNormalization(name="bn"),
                          activation, L.Dense(2)])
    )  # fmt: skip
    there = tn.place(model, "after_activation").model
    assert names(there)[1:3] == ["act", "bn"]
    back = tn.place(there, "before_activation").model
    assert back.get_config() == model.get_config()
    for ours, theirs in zip(back.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- pre-activation ----------------------------------------------------------------------------


def blocks(pre: bool, shortcut: bool = False) -> Any:
    """Two residual blocks of dense layers, as in He et al.: the first form, or pre-activation.

    With ``shortcut`` the second block has a dense layer with BatchNormalization on the shortcut.
    """

    def normal(name: str) -> Any:
        return L.BatchNormalization(name=name)

    def branch(x: Any, name: str) -> Any:
        x = L.Dense(4, name=f"{name}_1")(x)
        x = L.Dense(4, name=f"{name}_2")(L.ReLU(name=f"{name}_relu")(normal(f"{name}_bn1")(x)))
        return x if pre else normal(f"{name}_bn2")(x)

    inputs = keras.Input((3,), name="row")
    x = L.ReLU(name="stem_relu")(normal("stem_bn")(L.Dense(4, name="stem")(inputs)))
    x = L.Add(name="a_add")([x, branch(x, "a")])
    y = L.ReLU(name="a_out")(normal("a_bn2")(x) if pre else x)
    if shortcut:
        x = normal("b_bn0")(L.Dense(4, name="b_0")(y))
    elif not pre:
        x = y
    x = L.Add(name="b_add")([x, branch(y, "b")])
    x = L.ReLU(name="b_out")(normal("b_bn2")(x) if pre else x)
    return keras.Model(inputs, L.Dense(2, name="head")(x))


@pytest.mark.parametrize("shortcut", [False, True])
def test_residual_blocks_become_those_of_the_paper(shortcut: bool) -> None:
    model, paper = shake(blocks(pre=False, shortcut=shortcut)), blocks(pre=True, shortcut=shortcut)
    before, x = snapshot(model), inputs_for(model)
    rewrite = tn.place(model, "before_layer")
    shown = {c.path: c.what for c in rewrite.changed}
    behind = "moved behind Add {0}_add, before ReLU {0}_out".format
    onto = "moved with ReLU a_out before Dense b_1; the shortcut is the bare sum"
    assert shown == {"a_bn2": behind("a") if shortcut else onto, "b_bn2": behind("b")}
    reasons = {k.path: k.reason for k in rewrite.left}
    assert reasons["a_bn1"] == "already before Dense a_2, ReLU a_relu between them"
    assert reasons["stem_bn"].startswith("ReLU stem_relu behind it goes to ")
    if shortcut:
        assert reasons["b_bn0"] == (
            "one behind Add b_add is enough: BatchNormalization b_bn2 is the one to move"
        )
    for layer in paper.layers:
        layer.set_weights(model.get_layer(layer.name).get_weights())
    for ours, theirs in zip(predict(rewrite.model, x), predict(paper, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not tn.place(rewrite.model, "before_layer").changed
    assert snapshot(model) == before
    assert rewrite.notes[0].startswith("Moving statistics, gamma and beta belong to the old")


def test_a_study_knows_pre_activation() -> None:
    model = blocks(pre=False)
    assert check_placement(model, ("before_layer",)) == ()
    assert check_placement(model, ("before_activation",))[0].endswith(": a_bn2, b_bn2.")


def before_layer(*layers: Any) -> tn.Rewrite:
    return tn.place(shake(keras.Sequential([keras.Input((4,)), *layers])), "before_layer")


def test_pre_activation_in_a_chain() -> None:
    swapped = before_layer(
        L.Dense(4), L.ReLU(name="relu"), L.BatchNormalization(name="bn"), L.Dense(2)
    )
    assert names(swapped.model)[1:3] == ["bn", "relu"]
    kept = before_layer(L.Dense(4), L.BatchNormalization(), L.ReLU(name="r"), L.Dense(2, name="d"))
    assert kept.left[0].reason == "already before Dense d, ReLU r between them"
    last = before_layer(L.Dense(4), L.ReLU(), L.BatchNormalization())
    assert last.left[0].reason == (
        "its output goes to nothing: it is an output, not to convolution or dense layers alone"
    )


def test_a_sum_that_pre_activation_cannot_be_behind() -> None:
    inputs = keras.Input((4,))
    x = inputs + L.BatchNormalization(name="bn")(L.Dense(4)(inputs))
    plain = keras.Model(inputs, L.Dense(2, name="d")(x))
    reason = tn.place(plain, "before_layer").left[0].reason
    assert reason.endswith("is not followed by an activation alone, but by Dense d")
    y = L.ReLU(name="relu")(x)
    several = keras.Model(inputs, L.Add()([y, L.Dense(4, name="u")(y), L.Dense(4, name="v")(y)]))
    reason = tn.place(several, "before_layer").left[0].reason
    assert reason == "beside the shortcut ReLU relu goes to Dense u, Dense v, not to one layer"
    out = keras.Model(inputs, [L.Add()([y, L.Dense(4)(y)]), y])
    reason = tn.place(out, "before_layer").left[0].reason
    assert reason == "ReLU relu is an output of the model, and must stay one"


# --- removal and conflicts ---------------------------------------------------------------------


def test_removal_of_a_shared_layer_and_where_to_keep_the_outputs() -> None:
    rewrite = tn.place(two_towers(), "none")
    assert [c.what for c in rewrite.changed] == ["removed", "removed"]
    assert rewrite.notes[0].endswith("keep the outputs, use truenorm.fold(model).")


def test_two_sites_that_want_the_same_layer() -> None:
    """The dense layer between them is split for one, and would take the other's chain."""
    inputs = keras.Input((4,))
    x = L.Add()([inputs, L.BatchNormalization(name="one")(L.Dense(4)(inputs))])
    y = L.ReLU(name="relu")(x)
    z = L.BatchNormalization(name="two")(L.Dense(4, activation="relu", name="d")(y))
    model = keras.Model(inputs, L.Add()([y, L.Dense(4)(z)]))
    first = tn.place(model, "before_layer")
    assert [c.path for c in first.changed] == ["one"]
    assert first.left[0].reason == "a layer next to it is changed for another site: place again"
    second = tn.place(first.model, "before_layer")
    assert [c.path for c in second.changed] == ["two"]
    assert positions(second.model) == ["before_layer", "before_activation"]


def test_removal_of_one_that_is_not_along_the_channels_gives_no_bias() -> None:
    chain = [L.Conv1D(4, 3, use_bias=False, name="c"), L.BatchNormalization(axis=1), L.ReLU()]
    model = shake(keras.Sequential([keras.Input((6, 2)), *chain]))
    rewrite = tn.place(model, "none")
    assert [change.what for change in rewrite.changed] == ["removed"]
    assert not rewrite.model.get_layer("c").use_bias


def test_a_sequential_model_of_which_nothing_is_left_can_be_called() -> None:
    inner = keras.Sequential([keras.Input((4,)), L.BatchNormalization()], name="inner")
    model = shake(keras.Sequential([keras.Input((3,)), L.Dense(4), inner, L.ReLU()]))
    x = inputs_for(model)
    assert np.ptp(predict(tn.place(model, "none").model, x)[0]) > 0
    np.testing.assert_allclose(
        predict(tn.fold(model).model, x)[0], predict(model, x)[0], rtol=1e-4, atol=1e-5
    )


def test_a_site_does_not_go_into_a_model_where_its_name_is_taken() -> None:
    inner = keras.Sequential(
        [keras.Input((4,)), L.ReLU(name="relu"), L.BatchNormalization(name="bn")], name="inner"
    )
    chain = [L.Dense(4, name="d"), L.BatchNormalization(name="bn"), inner, L.Dense(2)]
    model = shake(keras.Sequential([keras.Input((4,)), *chain]))
    rewrite = tn.place(model, "after_activation")
    assert [(site.path, site.reason) for site in rewrite.left] == [
        ("bn", "where it would go, bn is a name already"),
        ("inner/bn", "already after an activation"),
    ]


# --- insertion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "shape"), LINEAR)
@pytest.mark.parametrize("position", ["before_activation", "after_activation"])
@pytest.mark.parametrize("inside", [True, False])
def test_insertion(layer: Any, shape: tuple[int, ...], position: Any, inside: bool) -> None:
    """The inserted layer normalises the right axis, and is where a move would put it."""
    changes = {"name": "linear", "activation": "silu" if inside else "linear"}
    layer = type(layer).from_config({**layer.get_config(), **changes})
    rest = [] if inside else [L.Activation("silu", name="silu")]
    model = shake(keras.Sequential([keras.Input(shape), layer, *rest, L.Dense(2, name="head")]))
    before = snapshot(model)
    rewrite = tn.place(model, position, insert=True)
    assert [c.path for c in rewrite.changed] == ["linear"]
    assert [(k.path, k.reason) for k in rewrite.left] == [
        ("head", "it is an output layer: no convolution or dense layer comes after it")
    ]
    assert positions(rewrite.model) == [position]
    batch_norm = rewrite.model.get_layer("linear_bn")
    for layer in model.layers:
        for ours, theirs in zip(
            rewrite.model.get_layer(layer.name).weights, layer.weights, strict=True
        ):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert batch_norm.moving_mean.shape[0] == batch_norm.output.shape[-1]
    assert rewrite.notes[0].startswith("A new BatchNormalization has mean 0, variance 1")
    assert snapshot(model) == before
    assert not tn.place(rewrite.model, position, insert=True).changed


def test_insertion_beside_what_is_there() -> None:
    """Existing ones are moved, an addition's branch is told apart, names stay unique."""
    inputs = keras.Input((4,))
    x = L.ReLU()(L.BatchNormalization(name="b_bn")(L.Dense(4, name="a")(inputs)))
    y = L.Dense(4, name="b", activation="relu")(x)
    x = L.Add()([x, L.Dense(4, name="c")(y)])
    model = keras.Model(inputs, L.Activation("softmax")(L.Dense(2, name="head")(x)))
    rewrite = tn.place(model, "after_activation", insert=True)
    assert {c.path: c.what.split(" inserted")[0] for c in rewrite.changed} == {
        "b_bn": rewrite.changed[0].what,
        "b": "BatchNormalization b_bn_1",
        "c": "BatchNormalization c_bn",
    }  # fmt: skip
    assert len(rewrite.notes) == 2
    only = tn.place(model, "before_activation", insert=True, where="c")
    assert [c.path for c in only.changed] == ["c"]


def test_a_batch_normalization_that_only_adds_normalises_nothing_of_it() -> None:
    """A branch that is added behind the normalisation lacks one of its own."""
    inputs = keras.Input((4,))
    main, branch = L.Dense(4, name="main")(inputs), L.Dense(4, name="branch")(inputs)
    x = tn.BatchNormalization(activation="relu")(main, add=branch)
    model = keras.Model(inputs, L.Dense(2, name="head")(x))
    rewrite = tn.place(model, "before_activation", insert=True)
    inserted = {c.path: c.what for c in rewrite.changed if "inserted" in c.what}
    assert inserted == {"branch": "BatchNormalization branch_bn inserted behind it"}
    assert not tn.place(rewrite.model, "before_activation", insert=True).changed


def test_a_layer_that_learns_does_not_move_into_a_frozen_model() -> None:
    x = inputs = keras.Input((5,))
    base = keras.Sequential([keras.Input((5,)), L.Dense(4), L.ReLU(name="relu")], name="base")
    base.trainable = False
    model = keras.Model(inputs, L.Dense(2)(L.BatchNormalization(name="bn")(base(x))))
    rewrite = tn.place(model, "before_activation")
    assert [site.reason for site in rewrite.left] == [
        "ReLU relu is in a frozen model, where it would be frozen too"
    ]
    assert rewrite.model.get_layer("bn").trainable
    model.get_layer("bn").trainable = False
    assert tn.place(model, "before_activation").changed


def test_insertion_into_a_nested_model_trains() -> None:
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4, activation="relu", name="d")])
    model = keras.Sequential([keras.Input((4,)), inner, L.Dense(1)])
    model.compile("sgd", "mse")
    new = tn.place(model, "before_activation", insert=True)
    x = inputs_for(model)
    new.model.fit(x, x[:, :1], verbose=0)
    (change,) = new.changed
    assert change.what == "BatchNormalization d_bn inserted before 'relu', split out"
    assert change.kind == "BatchNormalization inserted before 'relu', split out"
    assert np.abs(site_calls(new.model)[0][0].operation.get_weights()[2]).max() > 0


def test_insertion_with_the_channels_first() -> None:
    conv = L.Conv2D(3, 3, data_format="channels_first")
    model = keras.Sequential([keras.Input((2, 6, 5)), conv, L.Flatten(), L.Dense(1)])
    new = tn.place(model, "before_activation", insert=True).model
    assert (new.layers[1].axis, new.layers[1].moving_mean.shape) == (1, (3,))


def test_insertion_that_makes_no_sense_is_refused() -> None:
    model = blocks(pre=False)
    for position, where in (("none", None), ("before_activation", lambda _: True)):
        with pytest.raises(tn.OptionError, match=r"^BatchNormalization cannot be inserted like"):
            tn.place(model, position, where=where, insert=True)  # pyright: ignore[reportArgumentType]


def test_a_layer_with_an_activation_of_its_own_is_left() -> None:
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(6),
         tn.BatchNormalization(activation="relu", name="bn"), keras.layers.Dense(3)]
    )  # fmt: skip
    (site,) = tn.inspect(model).sites
    assert site.position == "before_activation"
    for position in ("none", "before_activation", "after_activation", "before_layer"):
        rewrite = tn.place(model, position)
        assert [one.reason for one in rewrite.left] == ["it has an activation of its own inside"]
        assert not rewrite.changed
