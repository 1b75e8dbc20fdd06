"""fold: what comes between, what merges, what stays. The oracle is the model that was given."""

from __future__ import annotations

import contextlib
import pathlib
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from small_models import inputs_for, predict, shake, snapshot

import truenorm as tn

pytestmark = pytest.mark.any_backend

L = keras.layers


def assert_folded(model: Any, *, stays: int = 0, x: Any = None) -> Any:
    """Fold it; the outputs are the same and as many BatchNormalization remain; the receipt."""
    before, x = snapshot(model), inputs_for(model) if x is None else x
    folded = tn.fold(model)
    for ours, theirs in zip(predict(folded.model, x), predict(model, x), strict=True):
        assert np.ptp(theirs) > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    kinds = [type(layer) for layer in folded.model._flatten_layers(include_self=False)]
    assert kinds.count(L.BatchNormalization) == stays
    assert tn.BatchNormalization not in kinds
    assert snapshot(model) == before
    return folded


def chain(shape: tuple[int, ...], *layers: Any) -> Any:
    """A Sequential model of copies: the layers of a table serve several tests."""
    copies = [type(layer).from_config(layer.get_config()) for layer in layers]
    return shake(keras.Sequential([keras.Input(shape), *copies]))


COMMUTING = {
    "dropout": [L.Dropout(0.5)],
    "spatial dropout and noise": [L.SpatialDropout2D(0.5), L.GaussianNoise(1.0)],
    "linear activation": [L.Activation("linear")],
    "average pooling": [L.AveragePooling2D(3, 2, padding="same")],
    "max pooling": [L.MaxPooling2D(3, 2, padding="same")],
    "cropping and upsampling": [L.Cropping2D(1), L.UpSampling2D(2, interpolation="bilinear")],
    "global average": [L.GlobalAveragePooling2D()],
    "global maximum, its axes kept": [L.GlobalMaxPooling2D(keepdims=True)],
}


@pytest.mark.parametrize("name", COMMUTING)
def test_what_commutes_may_come_between_it_and_the_layer_before(name: str) -> None:
    model = chain((8, 8, 3), L.Conv2D(4, 3), *COMMUTING[name], L.BatchNormalization(), L.ReLU())
    assert_folded(model)


@pytest.mark.parametrize("name", COMMUTING)
def test_what_commutes_may_come_between_it_and_the_layer_behind(name: str) -> None:
    layers = [L.ReLU(), L.BatchNormalization(), *COMMUTING[name], L.Flatten(), L.Dense(4)]
    assert_folded(chain((8, 8, 3), *layers))


@pytest.mark.parametrize(
    ("axis", "flatten"), [(-1, L.Flatten()), (1, L.Flatten()), (1, L.Flatten("channels_first"))]
)
def test_flattened_channels_are_still_theirs(axis: int, flatten: Any) -> None:
    assert_folded(chain((3, 4, 5), L.ReLU(), L.BatchNormalization(axis=axis), flatten, L.Dense(6)))


@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_maximum_does_not_commute_with_a_negative_scale(side: str) -> None:
    batch_norm, pool = L.BatchNormalization(name="bn"), L.MaxPooling2D(name="pool")
    before = [L.Conv2D(4, 3), pool, batch_norm, L.ReLU()]
    behind = [L.Conv2D(4, 3, activation="relu"), batch_norm, pool, L.Conv2D(2, 1)]
    model = chain((8, 8, 3), *(before if side == "before" else behind))
    gamma = model.get_layer("bn").gamma
    gamma.assign(-np.abs(gamma.numpy()))
    (left,) = assert_folded(model, stays=1).left
    reason = "MaxPooling2D pool, which would pick others where its scale is negative"
    assert reason in left.reason


@pytest.mark.parametrize(
    "layer",
    [
        L.Conv2D(6, 3, groups=2),
        L.Conv2D(6, 1, groups=3, padding="same", strides=2, use_bias=False),
        L.Conv1D(6, 3, groups=2, dilation_rate=2),
        L.DepthwiseConv2D(3, depth_multiplier=2),
        L.DepthwiseConv1D(3, use_bias=False),
        L.SeparableConv2D(4, 3, depth_multiplier=2),
        L.SeparableConv1D(4, 3, use_bias=False),
        L.Conv3D(4, 2),
    ],
)
def test_all_kinds_of_unpadded_convolutions_take_it_in_behind(layer: Any) -> None:
    rank = int(type(layer).__name__[-2])
    assert_folded(chain((*[7] * rank, 6), L.ReLU(), L.BatchNormalization(), layer))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (L.Conv2DTranspose(4, 2, name="c"), "Conv2DTranspose c spreads its input unevenly"),
        (L.DepthwiseConv2D(3, padding="same", name="c"), "DepthwiseConv2D c pads with zeros, so"),
        (L.ZeroPadding2D(name="pad"), "its output goes to ZeroPadding2D pad"),
        (L.Reshape((8, 27), name="r"), "its output goes to Reshape r"),
    ],
)
def test_what_would_change_the_function_is_not_done(layer: Any, reason: str) -> None:
    model = chain((6, 6, 6), L.ReLU(), L.BatchNormalization(), layer)
    (left,) = assert_folded(model, stays=1).left
    assert reason in left.reason


def test_a_causal_convolution_pads() -> None:
    model = chain((7, 3), L.ReLU(), L.BatchNormalization(), L.Conv1D(4, 3, padding="causal"))
    (left,) = assert_folded(model, stays=1).left
    assert "pads with zeros" in left.reason


# --- several layers around it ------------------------------------------------------------------


def test_every_layer_that_takes_its_output_takes_it_in() -> None:
    inputs = keras.Input((6, 6, 3))
    x = L.BatchNormalization()(L.ReLU()(inputs))
    outputs = [L.Conv2D(2, 3, name="a")(x), L.GlobalAveragePooling2D()(L.Conv2D(4, 1, name="b")(x))]
    folded = assert_folded(shake(keras.Model(inputs, outputs)))
    assert folded.changed[0].what == "folded into Conv2D b, Conv2D a after it"


def test_all_of_them_or_none() -> None:
    """One convolution could take it in, the padded one cannot: nothing may change."""
    inputs = keras.Input((6, 6, 3))
    x = L.BatchNormalization()(L.ReLU()(inputs))
    outputs = [L.Conv2D(2, 1)(x), L.Conv2D(2, 3, padding="same", name="padded")(x)]
    (left,) = assert_folded(shake(keras.Model(inputs, outputs)), stays=1).left
    assert "Conv2D padded pads with zeros" in left.reason


def test_concatenated_channels_each_keep_their_own() -> None:
    """As in Inception with its layers behind the activations: before, and after a join."""
    inputs = keras.Input((8, 8, 3))
    branches = [
        L.BatchNormalization(name=f"{width}")(L.Conv2D(width, 1, activation="relu")(inputs))
        for width in (2, 3, 4)
    ]
    joined = L.Concatenate()([branches[0], inputs, *branches[1:]])
    outputs = [L.Conv2D(2, 1)(joined), L.Conv2D(5, 1)(L.AveragePooling2D(3, 1, "same")(joined))]
    assert len(assert_folded(shake(keras.Model(inputs, outputs))).changed) == 3


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_layers_before_a_join_take_their_part_in(axis: int) -> None:
    inputs = keras.Input((6, 6, 3))
    widths = (2, 3) if axis == -1 else (4, 4)
    joined = L.Concatenate(axis=axis)([L.Conv2D(width, 3)(inputs) for width in widths])
    x = L.ReLU()(L.BatchNormalization()(L.MaxPooling2D()(joined)))
    assert_folded(shake(keras.Model(inputs, x)))


def test_the_layers_before_an_addition_take_the_scale_and_one_the_shift() -> None:
    inputs = keras.Input((6, 6, 3))
    total = L.Add()([L.Conv2D(4, 3)(inputs), L.Conv2D(4, 3)(inputs), L.Conv2D(4, 3)(inputs)])
    assert_folded(shake(keras.Model(inputs, L.ReLU()(L.BatchNormalization()(total)))))


def test_an_addition_of_a_tensor_to_itself_is_none() -> None:
    inputs = keras.Input((6, 6, 3))
    conv = L.Conv2D(4, 3)(inputs)
    twice = L.BatchNormalization()(L.Add(name="twice")([conv, conv]))
    (left,) = assert_folded(shake(keras.Model(inputs, L.ReLU()(twice))), stays=1).left
    assert left.reason.startswith("Add twice gets the same input twice")


def test_a_skipped_connection_stays() -> None:
    """The addition before it takes an input of the model: nothing there can be scaled."""
    inputs = keras.Input((6, 6, 3))
    total = L.Add()([L.Conv2D(3, 3, padding="same")(inputs), inputs])
    model = shake(keras.Model(inputs, L.ReLU()(L.BatchNormalization()(total))))
    (left,) = assert_folded(model, stays=1).left
    assert left.reason.startswith("its input comes from no layer: it is an input of the model")


# --- BatchNormalization next to BatchNormalization ----------------------------------------------


@pytest.mark.parametrize("kind", [L.BatchNormalization, tn.BatchNormalization])
def test_neighbours_become_one(kind: Any) -> None:
    model = chain((6, 6, 3), L.ReLU(), kind(name="a"), L.MaxPooling2D(), kind(name="b"), L.ReLU())
    folded = assert_folded(model, stays=1)
    assert [(c.path, c.what) for c in folded.changed] == [
        ("a", "folded into BatchNormalization b after it")
    ]
    assert [site.path for site in folded.left] == ["b"]


def test_all_of_a_row_go_into_the_layer_before_or_behind() -> None:
    row = [L.BatchNormalization() for _ in range(3)]
    assert_folded(chain((5,), L.Dense(4), *row, L.ReLU()))
    assert_folded(chain((5,), L.ReLU(), *row, L.Dense(4)))
    assert_folded(chain((5,), L.Dense(4), row[0], L.Dropout(0.5), *row[1:], L.Dense(2)))


def test_an_activation_inside_keeps_neighbours_apart() -> None:
    model = chain(
        (5,), L.Dense(4), tn.BatchNormalization(activation="relu", name="a"),
        L.BatchNormalization(name="b"), L.ReLU(),
    )  # fmt: skip
    folded = assert_folded(model, stays=1)
    assert [site.path for site in folded.left] == ["b"]


# --- what stays ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"scale": False}, {"center": False}, {"momentum": None}, {"activation": "silu"},
        {"virtual_batch_size": 4}, {"renorm": True}, {"freeze": "statistics"}, {"axis": 1},
    ],
)  # fmt: skip
def test_what_stays_of_ours_is_keras_and_computes_the_same(options: dict[str, Any]) -> None:
    layer = tn.BatchNormalization(name="bn", **options)
    model = chain((6, 6, 3), L.ReLU(), layer, L.Conv2D(2, 3, padding="same"))
    folded = assert_folded(model, stays=1)
    assert "truenorm" not in folded.model.to_json()


def test_a_shared_layer_of_ours_becomes_keras_too() -> None:
    left, right = keras.Input((3,)), keras.Input((3,))
    shared = tn.BatchNormalization()
    model = keras.Model([left, right], L.Dense(2)(L.Add()([shared(left), shared(right)])))
    assert {site.reason for site in assert_folded(shake(model), stays=1).left} == {
        "it is called more than once"
    }


def test_keras_layers_that_stay_are_left_as_they_are() -> None:
    model = chain((6, 6, 3), L.ReLU(), L.BatchNormalization(), L.Conv2D(2, 3, padding="same"))
    folded = assert_folded(model, stays=1).model
    assert folded.get_config() == model.get_config()


def test_only_the_sites_asked_for_are_folded_and_the_others_stay_whole() -> None:
    model = chain(
        (5,), L.ReLU(), tn.BatchNormalization(name="a"), tn.BatchNormalization(name="b"),
        L.Dense(4), tn.BatchNormalization(name="c"), L.ReLU(),
    )  # fmt: skip
    x = inputs_for(model)
    folded = tn.fold(model, where="[ac]")
    assert [(c.path, c.what.split()[2]) for c in folded.changed] == [("c", "Dense")]
    assert {(site.path, site.reason.split("; ")[-1]) for site in folded.left} == {
        ("a", "its output goes to BatchNormalization b, which stays"),
        ("b", "not selected"),
    }
    assert type(folded.model.get_layer("b")) is tn.BatchNormalization
    np.testing.assert_allclose(predict(folded.model, x)[0], predict(model, x)[0], atol=1e-4)
    with pytest.raises(tn.OptionError, match="The selection of sites is not understood"):
        tn.fold(model, where=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("nested", [False, True])
def test_a_call_in_training_mode_is_not_touched(nested: bool) -> None:
    inputs = keras.Input((5,))
    layer = L.BatchNormalization(name="a")
    if nested:
        layer = keras.Sequential([keras.Input((4,)), layer], name="inner")
    x = layer(L.Dense(4)(inputs), training=True)
    model = keras.Model(inputs, L.ReLU()(L.BatchNormalization(name="b")(x)))
    folded = tn.fold(shake(model))
    assert [(site.path, site.reason.split(";")[0]) for site in folded.left] == [
        ("inner/a" if nested else "a", "it is called with training=True"),
        ("b", "its input comes from BatchNormalization a"),
    ]


def far() -> Any:
    """A layer whose statistics are of values far from zero, near each other."""
    layer = tn.BatchNormalization(epsilon=1e-6)
    layer.build((None, 3))
    layer.moving_mean.assign(np.full(3, 1e4))
    layer.moving_variance.assign(np.full(3, 1e-2))
    return layer


def test_what_stays_loses_no_digits_where_the_mean_is_large() -> None:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.ReLU()(far()(L.ReLU()(inputs))))
    x = np.random.default_rng(0).normal(1e4, 0.1, (64, 3)).astype("float32")
    assert_folded(model, stays=1, x=x)


def test_folded_in_part_what_stays_goes_on_training() -> None:
    """Also where a neighbour would have been taken in."""
    model = chain(
        (5,), L.ReLU(), tn.BatchNormalization(name="a", freeze="affine"),
        L.BatchNormalization(name="b"), L.ReLU(), L.Dense(2), L.BatchNormalization(name="c"),
    )  # fmt: skip
    folded = tn.fold(model, where="*")
    assert [change.path for change in folded.changed] == ["c"]
    for name in ("a", "b"):
        ours, theirs = (m.get_layer(name) for m in (folded.model, model))
        assert (type(ours), ours.get_config()) == (type(theirs), theirs.get_config())
        for mine, other in zip(ours.weights, theirs.weights, strict=True):
            np.testing.assert_array_equal(mine.numpy(), other.numpy())


@pytest.mark.parametrize("side", ["before", "behind"])
def test_layers_that_compute_in_another_dtype_do_not_take_it(side: str) -> None:
    layers: Any = [L.BatchNormalization(name="bn"), L.Dense(3, dtype="mixed_bfloat16", name="d")]
    order = layers if side == "behind" else layers[::-1]
    model = shake(keras.Sequential([keras.Input((3,)), L.ReLU(), *order]))
    folded = tn.fold(model)
    assert "Dense d does not compute in float32, as it does" in folded.left[0].reason
    assert folded.model.outputs[0].dtype == model.outputs[0].dtype


def test_whole_numbers_are_not_what_a_layer_behind_takes() -> None:
    inputs = keras.Input((4, 4, 3), dtype="uint8")
    model = shake(keras.Model(inputs, L.Conv2D(2, 3)(L.BatchNormalization()(inputs))))
    (left,) = tn.fold(model).left
    assert left.reason.endswith("its input is uint8, which it makes floating")


def test_an_activation_that_stays_gets_a_name_that_is_free() -> None:
    model = chain(
        (3,), L.Dense(4), tn.BatchNormalization(activation="relu", name="bn"),
        L.Activation("tanh", name="bn_activation"),
    )  # fmt: skip
    assert_folded(model)


def test_a_merged_layer_keeps_the_name_of_its_activation() -> None:
    model = chain(
        (3,), L.ReLU(), L.BatchNormalization(),
        tn.BatchNormalization(activation="relu", name="bn"), L.Reshape((3, 1)),
    )  # fmt: skip
    names = [layer.name for layer in assert_folded(model, stays=1).model.layers]
    assert names[1:3] == ["bn", "bn_activation"]


def test_an_output_that_nobody_takes_stays_one() -> None:
    inputs, image = keras.Input((3,)), keras.Input((3,))
    hidden = L.ReLU()(image)
    inner = keras.Model(image, [hidden, L.BatchNormalization(name="b")(hidden)], name="inner")
    model = shake(keras.Model(inputs, L.Dense(2)(inner(inputs)[0])))
    (left,) = tn.fold(model).left
    assert (left.path, left.reason.split("; ")[-1]) == (
        "inner/b", "its output goes to nothing: it is an output")  # fmt: skip


def test_a_layer_along_the_batch_stays() -> None:
    inputs = keras.Input(batch_shape=(4, 3, 2))
    x = L.Flatten()(L.BatchNormalization(axis=0)(L.ReLU()(inputs)))
    (left,) = tn.fold(shake(keras.Model(inputs, L.Dense(2)(x)))).left
    assert left.reason == "its axis is that of the batch"


def test_a_model_that_cannot_be_one_program_is_folded_too() -> None:
    class Eager(L.Layer):
        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape

        def call(self, x: Any) -> Any:
            return x * (2.0 if float(keras.ops.convert_to_numpy(x).max()) < np.inf else 0.0)

    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.BatchNormalization()(L.Dense(2)(Eager()(inputs))))
    with torch_gradients_off():
        assert len(tn.fold(shake(model)).changed) == 1


def torch_gradients_off() -> Any:
    """PyTorch makes no array of a tensor that learns."""
    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_folded_model_is_saved_without_the_state_of_an_optimizer(
    policy: str, tmp_path: pathlib.Path
) -> None:
    """It loads without a warning of Keras's, and evaluates as before."""
    layers = [L.Dense(4, dtype=policy), L.BatchNormalization(dtype=policy), L.Dense(2)]
    model: Any = keras.Sequential([keras.Input((3,)), *layers])
    model.dtype_policy = keras.dtype_policies.get(policy)
    model.compile("adam", "mse", metrics=["mae"])
    x, y = np.random.default_rng(0).normal(size=(2, 16, 3)).astype("float32")
    model.fit(x, y[:, :2], verbose=0)
    file = tmp_path / "folded.keras"
    tn.fold(model).model.save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = keras.saving.load_model(file)
    wanted, found = (m.evaluate(x, y[:, :2], verbose=0, return_dict=True) for m in (model, loaded))
    assert found == pytest.approx(wanted, rel=1e-2 if policy == "mixed_float16" else 1e-5)
    assert {"loss", "mae"} == found.keys()
    size = sum(v.shape != () for v in loaded.optimizer.variables)
    assert size == 0
    part = tn.fold(model, where="dense*").model  # what goes on training keeps its optimizer
    assert type(part.optimizer) is type(model.optimizer)
