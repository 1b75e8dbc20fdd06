"""fold: across operations, masks and wrappers. The oracle is the model that was given.

Every way has its planted fault, which the proof must refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
from small_models import shake
from test_fold import assert_folded

import truenorm as tn
from truenorm._rewrites import absorb, einsum, fold, passing, rearranging

pytestmark = pytest.mark.any_backend

L = keras.layers
K = keras.ops

IMAGE, SEQUENCE, ROW = (6, 6, 3), (6, 3), (4,)


def conv(x: Any, width: int = 4) -> Any:
    return L.Conv2D(width, 3, padding="same", use_bias=False)(x)


def ends(x: Any, axis: int = -1) -> Any:
    """The site that is to be folded into what is before."""
    return L.ReLU()(L.BatchNormalization(axis=axis)(x))


def begins(x: Any, axis: int = -1) -> Any:
    """The site that is to be folded into what is behind."""
    return L.BatchNormalization(axis=axis)(L.ReLU()(x))


def flat(x: Any) -> Any:
    return L.Dense(2)(x)


BEFORE: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "+": (IMAGE, lambda x: ends(conv(x) + conv(x))),
    "+ of three": (IMAGE, lambda x: ends(conv(x) + conv(x) + conv(x))),
    "-": (IMAGE, lambda x: ends(conv(x) - conv(x))),
    "+ that broadcasts": (
        IMAGE, lambda x: ends(conv(x) + L.Dense(4)(K.mean(x, axis=(1, 2), keepdims=True)))),
    "Add that broadcasts": (
        IMAGE, lambda x: ends(L.Add()([L.Conv2D(4, 6)(x), conv(x)]))),
    "Average": (IMAGE, lambda x: ends(L.Average()([conv(x), conv(x), conv(x)]))),
    "concatenate": (IMAGE, lambda x: ends(K.concatenate([conv(x), conv(x, 5)], axis=-1))),
    "constant +": (IMAGE, lambda x: ends(0.5 + conv(x))),
    "- constant": (IMAGE, lambda x: ends(conv(x) - np.arange(4.0, dtype="float32"))),
    "constant -": (IMAGE, lambda x: ends(2.0 - conv(x))),
    "* constant": (IMAGE, lambda x: ends(conv(x) * -0.3)),
    "/ constant": (IMAGE, lambda x: ends(K.divide(conv(x), np.full((1, 4), 3.0, "float32")))),
    "/ number": (IMAGE, lambda x: ends(conv(x) / 3.0)),
    "negative": (IMAGE, lambda x: ends(-conv(x))),
    "Rescaling": (IMAGE, lambda x: ends(L.Rescaling(0.2, -1.0)(conv(x)))),
    "sum": (IMAGE, lambda x: ends(K.sum(conv(x), axis=(1, 2)))),
    "mean": (IMAGE, lambda x: ends(K.mean(conv(x), axis=1))),
    "Permute": (IMAGE, lambda x: ends(L.Permute((3, 1, 2))(conv(x)), 1)),
    "transpose": (IMAGE, lambda x: ends(K.transpose(conv(x), (0, 2, 3, 1)), 2)),
    "swapaxes": (IMAGE, lambda x: ends(K.swapaxes(conv(x), 1, 3), 1)),
    "moveaxis": (IMAGE, lambda x: ends(K.moveaxis(conv(x), -1, 1), 1)),
    "Reshape": (IMAGE, lambda x: ends(L.Reshape((36, 4))(conv(x)))),
    "reshape into the batch": (IMAGE, lambda x: ends(K.reshape(conv(x), (-1, 6, 4)))),
    "Reshape of the channels": (IMAGE, lambda x: ends(L.Reshape((36, 4, 1))(conv(x)), 2)),
    "slice": (IMAGE, lambda x: ends(conv(x)[:, 1:, ::2])),
    "some channels": (IMAGE, lambda x: ends(conv(x)[..., 1:])),
    "one place": (SEQUENCE, lambda x: ends(L.Dense(4)(x)[:, 0])),
    "flip": (IMAGE, lambda x: ends(K.flip(conv(x), axis=-1))),
    "squeeze": (IMAGE, lambda x: ends(K.squeeze(L.Conv2D(4, (6, 3))(x), 1))),
    "expand_dims": (SEQUENCE, lambda x: ends(K.expand_dims(L.Dense(4)(x), 1))),
    "RepeatVector": (ROW, lambda x: ends(L.RepeatVector(3)(L.Dense(4)(x)))),
    "pooling": (IMAGE, lambda x: ends(K.average_pool(conv(x), 2, 1, "same", "channels_last"))),
    "EinsumDense": (SEQUENCE, lambda x: ends(L.EinsumDense("abc,cd->abd", (6, 4))(x))),
    "EinsumDense, ellipsis": (
        IMAGE, lambda x: ends(L.EinsumDense("...c,cd->...d", 4, bias_axes="d")(x))),
    "EinsumDense, heads": (
        SEQUENCE,
        lambda x: ends(L.EinsumDense("abc,cde->abde", (6, 4, 2), bias_axes="de")(x), 2)),
    "TimeDistributed": (
        (3, *IMAGE),
        lambda x: L.ReLU()(
            L.TimeDistributed(L.BatchNormalization())(L.TimeDistributed(L.Conv2D(4, 3))(x)))),
    "TimeDistributed, one that is not": (
        (3, *IMAGE), lambda x: ends(L.TimeDistributed(L.Conv2D(4, 3))(x))),
    "SpectralNormalization": (
        IMAGE, lambda x: ends(L.SpectralNormalization(L.Conv2D(4, 3))(x))),
    "mask": (SEQUENCE, lambda x: ends(L.Dense(4)(L.Masking()(x)))),
    "mask of the channels": (SEQUENCE, lambda x: ends(L.Dense(4)(L.Masking()(x)), 2)),
    "mask, TimeDistributed": (
        SEQUENCE,
        lambda x: L.LSTM(3)(
            L.TimeDistributed(L.BatchNormalization())(
                L.TimeDistributed(L.Dense(4))(L.Masking()(x))))),
}  # fmt: skip

BEHIND: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "mean": (IMAGE, lambda x: flat(K.mean(begins(x), axis=(1, 2)))),
    "sum": (IMAGE, lambda x: flat(K.sum(begins(x), axis=(1, 2)))),
    "* constant": (IMAGE, lambda x: flat(begins(x) * 3.0)),
    "constant -": (IMAGE, lambda x: flat(2.0 - begins(x))),
    "Rescaling": (IMAGE, lambda x: flat(L.Rescaling(0.2, -1.0)(begins(x)))),
    "concatenate": (IMAGE, lambda x: flat(K.concatenate([x, begins(x)], axis=-1))),
    "Permute": (IMAGE, lambda x: flat(L.Permute((2, 3, 1))(begins(x, 1)))),
    "Reshape": (IMAGE, lambda x: flat(L.Reshape((36, 3))(begins(x)))),
    "reshape of all": (IMAGE, lambda x: flat(K.reshape(begins(x), (-1, 108)))),
    "Reshape of open lengths": (
        (None, 4, 3), lambda x: L.GlobalAveragePooling1D()(flat(L.Reshape((-1, 3))(begins(x))))),
    "one place": (SEQUENCE, lambda x: flat(begins(x)[:, -1])),
    "EinsumDense": (
        SEQUENCE, lambda x: L.EinsumDense("abc,cd->abd", (6, 4), bias_axes="d")(begins(x))),
    "EinsumDense, no bias": (
        SEQUENCE, lambda x: L.EinsumDense("abc,bcd->abd", (6, 4))(begins(x))),
    "TimeDistributed": (
        (3, *IMAGE),
        lambda x: L.TimeDistributed(L.Conv2D(4, 3))(
            L.TimeDistributed(L.BatchNormalization())(L.ReLU()(x)))),
    "SpectralNormalization": (
        IMAGE, lambda x: L.SpectralNormalization(L.Conv2D(4, 3))(begins(x))),
    "mask": (
        SEQUENCE, lambda x: flat(L.BatchNormalization()(L.Masking()(L.Activation("tanh")(x))))),
    "masked average": (
        SEQUENCE,
        lambda x: flat(L.GlobalAveragePooling1D()(L.BatchNormalization()(L.Masking()(x))))),
}  # fmt: skip

WAYS = {f"{side}: {name}": way for side, table in (("before", BEFORE), ("behind", BEHIND))
        for name, way in table.items()}  # fmt: skip


def build(way: str) -> Any:
    shape, function = WAYS[way]
    inputs = keras.Input(shape)
    return shake(keras.Model(inputs, function(inputs)))


@pytest.mark.parametrize("way", WAYS)
def test_it_is_folded(way: str) -> None:
    model = build(way)
    x = np.random.default_rng(0).normal(size=(4, *(n or 5 for n in WAYS[way][0])))
    folded = assert_folded(model, x=x.astype("float32"))
    assert [change.what.split()[-2] for change in folded.changed] == [
        {"before": "before", "behind": "after"}[way.partition(":")[0]]
    ]


# --- planted faults ------------------------------------------------------------------------------


def other_channel(affine: Any, channel: int = 1) -> Any:
    one = np.arange(len(affine.scale)) == channel
    return replace(affine, scale=affine.scale * (1 + 0.1 * one))


def other_shift(affine: Any, channel: int = 1) -> Any:
    return replace(affine, shift=affine.shift + 0.1 * (np.arange(len(affine.shift)) == channel))


def shuffled(affine: Any) -> Any:
    return replace(affine, scale=affine.scale[::-1], shift=affine.shift[::-1])


FAULTS = (other_channel, other_shift, shuffled)
# Each way with one of them, in turn; with the others in `make long`.
PLANTED = [
    pytest.param(way, fault, marks=() if at % 3 == turn else pytest.mark.long)
    for at, way in enumerate(WAYS)
    for turn, fault in enumerate(FAULTS)
]


@pytest.mark.parametrize(("way", "fault"), PLANTED)
def test_a_wrong_map_gives_no_model(
    way: str, fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes to the first layer that takes it in is not what it should be."""
    taken, faults = absorb._taken, [fault]
    monkeypatch.setattr(
        absorb, "_taken", lambda *a, **k: (faults or [lambda x: x]).pop()(taken(*a, **k))
    )
    refused(build(way))


def refused(model: Any) -> None:
    with pytest.raises(tn.VerificationError, match=r"^Folding would change what the model"):
        tn.fold(model)


def without_shift(affine: Any) -> Any:
    return affine and replace(affine, shift=0 * affine.shift)


def without_bias(values: list[Any]) -> list[Any]:
    return [values[0], 0 * values[1]]


STEPS: list[tuple[str, Any, str, Callable[[Any], Any]]] = [
    ("before: Permute", passing, "moved", shuffled),
    ("before: some channels", passing, "moved", shuffled),
    ("behind: reshape of all", rearranging, "_where_to", lambda k: k if k is None else k[::-1]),
    ("before: sum", passing, "_reduced", without_shift),
    ("behind: sum", passing, "_reduced", without_shift),
    ("before: constant +", passing, "_scaled", without_shift),
    ("behind: constant -", passing, "_scaled", without_shift),
    ("before: Average", absorb, "parts", lambda found: [found[0], *map(without_shift, found[1:])]),
    ("before: +", absorb, "parts", lambda found: [found[0]] * len(found)),
    ("behind: concatenate", absorb, "among", shuffled),
    ("before: EinsumDense", einsum, "with_map_behind", without_bias),
    ("behind: EinsumDense", einsum, "with_map_before", without_bias),
    ("before: TimeDistributed", fold, "with_map_behind", without_bias),
    ("before: SpectralNormalization", fold, "with_map_behind", without_bias),
]


@pytest.mark.parametrize(("way", "module", "name", "fault"), STEPS)
def test_a_wrong_step_gives_no_model(
    way: str, module: Any, name: str, fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, right = build(way), getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: fault(right(*a, **k)))
    refused(model)


# --- what must not be folded ---------------------------------------------------------------------


def stays(model: Any, reason: str) -> None:
    (left,) = assert_folded(shake(model), stays=1).left
    assert reason in left.reason


@pytest.mark.parametrize(
    ("name", "shape", "function", "reason"),
    [
        ("steps", SEQUENCE, lambda x: ends(L.TimeDistributed(L.Dense(4))(x), 1), "TimeDistributed"),
        ("mixed", IMAGE, lambda x: ends(K.mean(conv(x), axis=(1, 3))), "axis is not the channel"),
        ("zero", IMAGE, lambda x: ends(conv(x) * np.array([1, 0, 1, 1], "float32")), "Multiply"),
        ("reciprocal", ROW, lambda x: ends(1.0 / (3.0 + L.Dense(4)(x))), "TrueDivide"),
        ("pixels", (6, 4), lambda x: ends(L.Dense(4)(x) * K.ones((6, 4))), "Multiply"),
        ("places", SEQUENCE, lambda x: ends(L.Reshape((24,))(L.Dense(4)(x))), "Reshape"),
        ("pad", IMAGE, lambda x: ends(K.pad(conv(x), [[0, 0], [1, 1], [1, 1], [0, 0]])), "Pad"),
        ("product", IMAGE, lambda x: ends(conv(x) * conv(x)), "Multiply"),
        ("kernel", SEQUENCE,
         lambda x: ends(L.EinsumDense("abc,cd->abd", (6, 4))(x), 1), "EinsumDense"),
        ("wider", ROW, lambda x: ends(L.Dense(1)(x) + np.arange(3.0, dtype="float32")), "Add"),
        ("longer", ROW,
         lambda x: ends(K.multiply(np.ones(3, "float32"), L.Dense(1)(x))), "Multiply"),
        ("initial", SEQUENCE,
         lambda x: ends(K.max(L.Dense(4)(x), axis=1, initial=0.5)), "Max"),
        ("initial behind", SEQUENCE,
         lambda x: flat(K.min(L.BatchNormalization()(x), axis=1, initial=0.5)), "Min"),
    ],
)  # fmt: skip
def test_what_does_not_commute_is_left(
    name: str, shape: tuple[int, ...], function: Callable[[Any], Any], reason: str
) -> None:
    inputs = keras.Input(shape)
    stays(keras.Model(inputs, function(inputs), name=name), reason)


def test_a_kernel_that_is_normalised_in_this_call_takes_nothing_in() -> None:
    inputs = keras.Input(ROW)
    x = L.SpectralNormalization(L.Dense(4), name="s")(inputs, training=True)
    model = shake(keras.Model(inputs, ends(x)))
    (left,) = tn.fold(model).left
    assert left.reason.startswith("SpectralNormalization s is called with training=True")


def test_in_a_model_that_goes_on_training_a_normalised_kernel_stays() -> None:
    inputs = keras.Input(ROW)
    x = L.SpectralNormalization(L.Dense(4), name="s")(inputs)
    model = shake(keras.Model(inputs, ends(x)))
    (left,) = tn.fold(model, where="*").left
    assert left.reason.startswith("SpectralNormalization s normalises its kernel in training")


def test_of_steps_what_stays_becomes_keras_and_what_learns_is_kept() -> None:
    inputs = keras.Input(SEQUENCE)
    ours = tn.BatchNormalization(name="bn", freeze="affine")
    x = L.TimeDistributed(ours, name="steps")(L.ReLU()(inputs))
    folded = assert_folded(shake(keras.Model(inputs, L.ReLU()(x))), stays=1)
    assert [left.path for left in folded.left] == ["steps/bn"]
    (layer,) = [k for k in folded.model.layers if isinstance(k, L.TimeDistributed)]
    assert (layer.name, layer.layer.name) == ("steps", "bn")
    assert not layer.layer.gamma.trainable


@pytest.mark.parametrize("stays", [False, True])
def test_the_activation_of_a_layer_inside_a_wrapper(stays: bool) -> None:
    """It becomes a layer of its own; what is compared is in front of it."""
    inputs = keras.Input((5, 2))
    x: Any = inputs if stays else L.Dense(3)(inputs)
    x = L.TimeDistributed(tn.BatchNormalization(activation="relu"))(x)
    assert_folded(shake(keras.Model(inputs, x)), stays=stays)


@pytest.mark.filterwarnings("ignore:.*does not support masking")
def test_a_nested_model_is_entered_behind_a_mask() -> None:
    """Keras hands the mask on to it as a further argument."""
    inputs, inner = keras.Input((4,)), keras.Input((4,))
    nested: Any = keras.Model(inner, L.BatchNormalization()(L.Dense(3)(inner)))
    masked: Any = L.BatchNormalization()(inputs, mask=keras.ops.any(inputs > 0, axis=-1))
    assert len(assert_folded(shake(keras.Model(inputs, nested(masked)))).changed) == 2
