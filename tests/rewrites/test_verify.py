"""The proof of a rewrite: what a planted fault looks like where the outputs cannot show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
from small_models import dense, predict, shake

import truenorm as tn
import truenorm._rewrites.fold

pytestmark = pytest.mark.any_backend

L = keras.layers

# --- models whose outputs show nothing -----------------------------------------------------------


def mobile() -> Any:
    """All outputs are alike, however wrong a layer is."""
    return keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)


def unit(x: Any, name: str = "bn") -> Any:
    return L.ReLU()(L.BatchNormalization(name=name)(L.Dense(5, name=f"{name}_dense")(x)))


def saturated() -> Any:
    inputs = keras.Input((5,))
    return shake(keras.Model(inputs, keras.ops.sigmoid(100.0 + 0.001 * unit(unit(inputs, "a")))))


def largest() -> Any:
    inputs = keras.Input((5,))
    x = L.Dense(3)(unit(unit(inputs, "a")))
    model = shake(keras.Model(inputs, keras.ops.argmax(x, axis=-1)))
    model.layers[-1].bias.assign([0.0, 1e6, 0.0])
    return model


def logarithm() -> Any:
    inputs = keras.Input((5,))
    return shake(keras.Model(inputs, unit(unit(keras.ops.log(inputs - 50.0), "a"))))


def gate() -> Any:
    inputs = keras.Input((5,))
    closed = keras.ops.relu(inputs - 50.0)
    return shake(keras.Model(inputs, unit(unit(inputs, "a")) * closed))


def gate_before() -> Any:
    """What the sites get is zero already."""
    inputs = keras.Input((5,))
    return shake(keras.Model(inputs, unit(unit(keras.ops.relu(inputs - 50.0), "a"))))


MODELS = [mobile, saturated, largest, logarithm, gate, gate_before]

# --- faults --------------------------------------------------------------------------------------

affine_of = truenorm._rewrites.fold.affine_of
with_map_behind = truenorm._rewrites.fold.with_map_behind


def only(vector: Any, channel: int) -> Any:
    return np.arange(len(vector)) == channel


def swapped(layer: Any, values: Any, affine: Any) -> Any:
    """The scale goes along another axis of the kernel, where it has one as long."""
    *kernels, bias = with_map_behind(layer, values, affine)
    if type(layer) is L.Dense and kernels[-1].shape[0] == kernels[-1].shape[1]:
        kernels[-1] = values[-2] * affine.scale[:, None]
    elif type(layer) is L.DepthwiseConv2D:
        kernels[-1] = values[-2] * affine.scale[::-1].reshape(values[-2].shape[-2:])
    return [*kernels, bias]


def wrong(change: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda layer: change(layer, affine_of(layer))


ONE = ("a", "block_3_expand_BN")
FAULTS: dict[str, tuple[str, Any]] = {
    "scale": ("affine_of", wrong(lambda _, a: replace(a, scale=1.01 * a.scale))),
    "shift": ("affine_of", wrong(lambda _, a: replace(a, shift=a.shift + 0.01))),
    "scale of one channel": (
        "affine_of", wrong(lambda _, a: replace(a, scale=a.scale * (1 + 0.01 * only(a.scale, 2)))),
    ),
    "shift of one channel": (
        "affine_of", wrong(lambda _, a: replace(a, shift=a.shift + 0.01 * only(a.shift, 2))),
    ),
    "one site of many": (
        "affine_of", wrong(lambda k, a: replace(a, shift=a.shift + 0.01 * (k.name in ONE))),
    ),
    "axis": ("with_map_behind", swapped),
}  # fmt: skip


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gives_no_model(
    build: Callable[[], Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (function, faulty) = build(), FAULTS[fault]
    if build is mobile and fault == "axis":  # with the statistics of a new layer all scales are one
        shake(model)
    monkeypatch.setattr(truenorm._rewrites.fold, function, faulty)
    message = (
        r"^Folding would change what the model computes, so no model is returned \(at '.*'\)\. "
        r"Expected: each channel equal within 0\.0001 of its range\. Received: .*\. "
        r"Remedy: report this as a fault of truenorm, with the model\.$"
    )
    with pytest.raises(tn.VerificationError, match=message):
        tn.fold(model)


@pytest.mark.parametrize("build", MODELS)
def test_the_receipt_says_what_the_outputs_cannot_show(build: Callable[[], Any]) -> None:
    rewrite = tn.fold(build())
    assert rewrite.changed
    assert rewrite.max_site_error is not None
    assert 0 < rewrite.max_site_error <= 1e-4
    assert rewrite.notes == (
        "The outputs show nothing of the change: on this probe they are the same for all samples, "
        "or not finite. Each changed site was compared by itself, on random numbers.",
    )


def test_a_probe_that_shows_something_needs_no_note() -> None:
    assert not tn.fold(gate(), probe=np.random.default_rng(0).normal(60.0, 1.0, (8, 5))).notes
    assert not tn.fold(dense()).notes


def test_a_batch_of_one_shows_something() -> None:
    inputs = keras.Input((5,), batch_size=1)
    assert not tn.fold(shake(keras.Model(inputs, L.Dense(3)(unit(inputs))))).notes


@pytest.mark.parametrize("to", ["keras", "truenorm"])
def test_a_replacement_that_loses_a_value_gives_no_model(
    to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What carries values over is at fault; the model's outputs are all alike."""
    carry = truenorm._model.rebuild.carry_values

    def carry_wrong(old: Any, new: Any, values: Any) -> None:
        carry(old, new, values)
        if new.name == "a":
            new.moving_mean.assign(new.moving_mean + 0.01)

    model = saturated()
    if to == "keras":
        model = tn.replace(model, "truenorm").model
    monkeypatch.setattr("truenorm._model.rebuild.carry_values", carry_wrong)
    with pytest.raises(tn.VerificationError, match=r"^Replacing would change .* \(at 'a'\)"):
        tn.replace(model, to)


# --- what must not be refused --------------------------------------------------------------------


def test_an_activation_inside_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Any:
        layer = tn.BatchNormalization(activation="relu", name="bn")
        model = shake(keras.Sequential([keras.Input((5,)), L.Dense(4), layer, L.Dense(2)]))
        layer.beta.assign(np.full(4, -100.0))  # nothing comes through
        return model

    assert tn.fold(build()).changed
    name, faulty = FAULTS["scale"]
    monkeypatch.setattr(truenorm._rewrites.fold, name, faulty)
    with pytest.raises(tn.VerificationError):
        tn.fold(build())


def test_digits_that_the_old_model_loses_itself_are_no_fault() -> None:
    """The layer before it puts out numbers near 10,000, which the statistics take away again."""
    model = keras.Sequential([keras.Input((5,)), L.Dense(4), L.BatchNormalization(epsilon=1e-6)])
    shake(model)
    model.layers[0].bias.assign(np.full(4, 1e4))
    model.layers[1].moving_mean.assign(np.full(4, 1e4))
    rewrite = tn.fold(model)
    assert rewrite.changed
    assert rewrite.max_site_error is not None
    assert rewrite.max_site_error > 1e-4


def test_a_scale_of_zero_is_folded() -> None:
    model = shake(dense())
    model.get_layer("bn").gamma.assign(np.array([0.0, 1.0, 0.0, 2.0, 0.0, 1.0]))
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    folded = tn.fold(model).model
    np.testing.assert_allclose(predict(folded, x)[0], predict(model, x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [12, 40])
def test_open_lengths_are_long_enough_for_the_kernels(kernel: int) -> None:
    inputs = keras.Input((None, 3))
    x = L.GlobalAveragePooling1D()(L.ReLU()(L.BatchNormalization()(L.Conv1D(4, kernel)(inputs))))
    assert tn.fold(shake(keras.Model(inputs, x))).changed
