"""replace to GroupNormalization, LayerNormalization or a frozen map; and with other options."""

from __future__ import annotations

from collections.abc import Callable
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

pytestmark = pytest.mark.any_backend

L = keras.layers
EPSILON = 1e-3


def layers_of(model: Any, kind: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers() if type(layer) is kind]


def alone(axis: int, shape: tuple[int, ...], **options: Any) -> Any:
    """One shaken BatchNormalization."""
    layer = L.BatchNormalization(axis=axis, epsilon=EPSILON, name="bn", **options)
    return shake(keras.Sequential([keras.Input(shape), layer]))


def by_hand(model: Any, x: np.ndarray, groups: int, axis: int, *, positions: bool) -> np.ndarray:
    """Within each sample, in float64: over groups of channels, with or without all positions."""
    gamma, beta = (np.float64(w.numpy()) for w in model.layers[0].weights[:2])
    z = np.moveaxis(np.float64(x), axis, -1)
    grouped = z.reshape(*z.shape[:-1], groups, -1)
    over = (*range(1, z.ndim - 1), -1) if positions else (-1,)
    mean, variance = grouped.mean(over, keepdims=True), grouped.var(over, keepdims=True)
    z = ((grouped - mean) / np.sqrt(variance + EPSILON)).reshape(z.shape)
    return np.moveaxis(z * gamma + beta, -1, axis)


# --- to group and to layer ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "groups", "axis", "shape"),
    [
        ("group", 3, -1, (12,)), ("group", 3, -1, (3, 5, 12)), ("group", 3, 1, (12, 3, 5)),
        ("group", 1, -1, (12,)), ("group", 1, 2, (3, 12, 5)), ("layer", None, -1, (12,)),
        ("layer", None, -1, (3, 5, 12)),
    ],
)  # fmt: skip
def test_each_sample_is_normalised_by_itself(
    to: Any, groups: int | None, axis: int, shape: tuple[int, ...]
) -> None:
    model = alone(axis, shape)
    before, x = snapshot(model), inputs_for(model)
    rewrite = tn.replace(model, to=to, groups=groups)
    expected = by_hand(model, x, groups or 1, axis, positions=to == "group")
    np.testing.assert_allclose(predict(rewrite.model, x)[0], expected, rtol=1e-4, atol=1e-4)
    trained = np.array(keras.ops.convert_to_numpy(rewrite.model(x, training=True)))
    np.testing.assert_allclose(trained, expected, rtol=1e-4, atol=1e-4)
    assert snapshot(model) == before
    assert (rewrite.max_abs_error, rewrite.max_site_error) == (None, None)
    assert rewrite.notes[0].startswith("The new model computes something else: each sample")


@pytest.mark.parametrize(
    ("build", "kind"), [(residual, "truenorm"), (nested, "keras"), (two_towers, "keras")]
)
@pytest.mark.parametrize("to", ["group", "layer"])
def test_every_site_gives_gamma_and_beta_and_the_model_trains(
    build: Callable[..., Any], kind: str, to: Any
) -> None:
    model = shake(build(kind))
    groups = 2 if to == "group" else None
    rewrite = tn.replace(model, to=to, groups=groups)
    assert rewrite.left == ()
    classes = {"group": L.GroupNormalization, "layer": L.LayerNormalization}
    news = {layer.name: layer for layer in layers_of(rewrite.model, classes[to])}
    olds = [k for k in model._flatten_layers() if isinstance(k, L.BatchNormalization)]
    assert set(news) == {layer.name for layer in olds}
    for old in olds:
        new = news[old.name]
        for name in ("gamma", "beta"):
            np.testing.assert_array_equal(getattr(new, name).numpy(), getattr(old, name).numpy())
            assert getattr(new, name).path == getattr(old, name).path
        assert new.epsilon == old.epsilon
    x = inputs_for(model)
    targets = keras.tree.map_structure(np.zeros_like, rewrite.model.predict(x, verbose=0))
    losses = keras.tree.map_structure(lambda _: "mse", targets)
    rewrite.model.compile("sgd", losses)
    loss = rewrite.model.fit(x, targets, epochs=3, verbose=0).history["loss"]
    assert loss[-1] < loss[0]


def test_what_does_not_learn_does_not_afterwards() -> None:
    model = residual("truenorm")
    model.get_layer("a_bn").trainable = False
    tn.freeze(model, "affine", layers="b_bn")
    new = tn.replace(model, to="group", groups=4).model
    learning = {v.path for v in new.trainable_variables}
    assert "a_bn/gamma" not in learning
    assert "b_bn/gamma" not in learning
    assert {"c_bn/gamma", "c_bn/beta"} <= learning


def test_compile_and_regularizers_go_along() -> None:
    layer = L.BatchNormalization(gamma_regularizer="l2", scale=True, center=False, name="bn")
    model = keras.Sequential([keras.Input((4,)), layer, L.Dense(1)])
    model.compile(keras.optimizers.SGD(0.3), "mse")
    new = tn.replace(model, to="layer").model
    assert float(new.optimizer.learning_rate) == pytest.approx(0.3)
    layer = new.layers[0]
    assert (layer.center, layer.beta) == (False, None)
    assert isinstance(layer.gamma_regularizer, keras.regularizers.L2)


def test_layers_inside_others_are_found() -> None:
    wrapped = L.TimeDistributed(L.BatchNormalization(name="bn"), name="each")
    model = shake(keras.Sequential([keras.Input((3, 4)), wrapped]))
    new = tn.replace(model, to="layer")
    assert [c.path for c in new.changed] == ["each/bn"]
    x = inputs_for(model)
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    gamma, beta = (w.numpy() for w in model.weights[:2])
    np.testing.assert_allclose(predict(new.model, x)[0], z * gamma + beta, rtol=1e-3, atol=1e-4)
    own = tn.replace(subclassed(), to="group", groups=1).model
    assert type(own.bn) is L.GroupNormalization
    assert np.isfinite(predict(own, np.ones((2, 3), "float32"))[0]).all()


@pytest.mark.parametrize(
    ("build", "groups", "message"),
    [
        (residual, 3,
         "This number of groups does not divide the channels (at 'stem_bn'). Expected: a divisor "
         "of its 4 channels. Received: groups=3. Remedy: groups=2 divides those of every layer."),
        (residual, 32,
         "This number of groups does not divide the channels (at 'stem_bn'). Expected: a divisor "
         "of its 4 channels. Received: groups=32. Remedy: groups=4 divides those of every layer."),
        (dense, 6,
         "A group of one value has nothing to be normalised with (at 'bn'). Expected: a divisor of "
         "its 6 channels, and a smaller one: its input has no other axis. Received: groups=6. "
         "Remedy: groups=3 divides those of every layer."),
        (residual, 0, "groups must be a positive integer. Received: 0."),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused(build: Any, groups: Any, message: str) -> None:
    with pytest.raises(tn.OptionError) as caught:
        tn.replace(build(), to="group", groups=groups)
    assert str(caught.value) == message


@pytest.mark.parametrize(("build", "groups"), [(residual, 4), (dense, 3)])
def test_without_a_number_there_are_as_many_groups_as_fit_all_layers(
    build: Any, groups: int
) -> None:
    rewrite = tn.replace(build(), to="group")
    made = [k for k in rewrite.model.layers if isinstance(k, L.GroupNormalization)]
    assert {layer.groups for layer in made} == {groups}
    assert rewrite.changed[0].what == f"now GroupNormalization of {groups} groups"


def test_what_cannot_be_converted_is_left_with_its_reason() -> None:
    class Mine(L.BatchNormalization):
        pass

    inputs, mask = keras.Input((5, 2)), keras.Input((5,), dtype="bool")
    x = Mine(name="mine")(inputs)
    x = tn.BatchNormalization(activation="relu", name="fused")(x)
    shared = L.BatchNormalization(name="shared")
    x = shared(shared(x), mask=mask)
    x = L.BatchNormalization(name="one")(L.Dense(1)(x))
    model = keras.Model([inputs, mask], x)
    own = {"mine": "its class Mine is a custom subclass"}
    masked = "it is called with a mask, which GroupNormalization does not take"
    reasons = {
        "group": {**own, "shared": masked, "shared#2": masked, "one": masked},  # Keras hands it on
        "layer": {**own, "one": "it has one channel, which would be constant"},
        "affine": own,
    }
    for to, expected in reasons.items():
        groups = 1 if to == "group" else None
        left = tn.replace(model, to=to, groups=groups).left
        assert {k.path: k.reason for k in left} == expected


def test_layers_that_stay_have_no_say_in_the_groups() -> None:
    """One channel alone in its sample is left; so is what another group count would not fit."""
    inputs = keras.Input((4, 6))
    x = tn.BatchNormalization(domains=2, name="several")(L.Dense(5)(inputs))
    x = L.BatchNormalization(name="bn")(L.Dense(12)(x))
    x = L.BatchNormalization(name="one")(L.Dense(1)(L.Flatten()(x)))
    model = keras.Model(inputs, x)
    for groups, expected in ((None, 12), (4, 4)):
        rewrite = tn.replace(model, to="group", groups=groups)
        assert {c.path: c.what for c in rewrite.changed} == {
            "bn": f"now GroupNormalization of {expected} groups"
        }
        assert {k.path: k.reason for k in rewrite.left} == {
            "several": "it has several domains",
            "one": "it has one channel, which would be constant",
        }


def test_layer_normalization_needs_the_channels_last() -> None:
    (left,) = tn.replace(alone(1, (12, 3, 5)), to="layer").left
    assert left.reason == (
        "its channels are not on the last axis, as LayerNormalization needs it on PyTorch"
    )


def test_a_mask_reaches_what_comes_after() -> None:
    layers = [L.Masking(), L.BatchNormalization(name="bn"), L.GlobalAveragePooling1D()]
    model = shake(keras.Sequential([keras.Input((4, 3)), *layers]))
    x = inputs_for(model)
    x[:, 2:] = 0
    for to in ("layer", "affine"):
        new = tn.replace(model, to=to).model
        (output,) = predict(new, x)
        np.testing.assert_allclose(output, predict(new, x[:, :2])[0], rtol=1e-5, atol=1e-6)


# --- to affine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "kind"),
    [(dense, "keras"), (residual, "truenorm"), (nested, "keras"), (two_towers, "truenorm")],
)
def test_a_frozen_map_computes_what_inference_did(build: Callable[..., Any], kind: str) -> None:
    model = shake(build(kind))
    before, x = snapshot(model), inputs_for(model)
    rewrite = tn.replace(model, to="affine")
    assert rewrite.left == ()
    assert rewrite.max_rel_error is not None
    assert rewrite.max_rel_error <= 1e-5
    new = rewrite.model
    assert not any(isinstance(k, L.BatchNormalization) for k in new._flatten_layers())
    for ours, theirs in zip(predict(new, x), predict(model, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    trained = keras.tree.flatten(new(x, training=True))
    for ours, theirs in zip(trained, predict(new, x), strict=True):
        np.testing.assert_array_equal(np.array(keras.ops.convert_to_numpy(ours)), theirs)
    new.trainable = False
    new.trainable = True
    assert not any(v.path.endswith(("scale", "shift", "center")) for v in new.trainable_variables)
    assert snapshot(model) == before


@pytest.mark.parametrize(("axis", "shape"), [(-1, (6,)), (1, (6, 4, 4)), (2, (3, 6, 2))])
def test_no_digits_are_lost_on_any_axis(axis: int, shape: tuple[int, ...]) -> None:
    """A mean of 1000 with a standard deviation of 0.05, in float64 by hand."""
    model = alone(axis, shape)
    gamma, beta, mean, variance = model.layers[0].weights
    mean.assign(np.full(6, 1000.0))
    variance.assign(np.full(6, 0.05**2))
    new = tn.replace(model, to="affine").model
    x = np.random.default_rng(0).normal(1000, 0.05, (4, *shape)).astype("float32")
    z = np.moveaxis(np.float64(x), axis, -1)
    z = (z - 1000) / np.sqrt(np.float64(variance.numpy()) + EPSILON)
    expected = np.moveaxis(z * gamma.numpy() + beta.numpy(), -1, axis)
    np.testing.assert_allclose(predict(new, x)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_map_in_a_file_and_under_a_16_bit_policy(tmp_path: Path) -> None:
    layers = [L.Dense(4), L.BatchNormalization(name="bn")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    shake(model)
    new = tn.replace(model, to="affine").model
    new.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    x = inputs_for(model)
    np.testing.assert_array_equal(predict(again, x)[0], predict(new, x)[0])
    for policy in ("mixed_bfloat16", "bfloat16"):
        half = keras.Sequential([keras.Input((3,)), L.BatchNormalization(name="bn", dtype=policy)])
        rewrite = tn.replace(shake(half), to="affine")
        assert {v.dtype for v in rewrite.model.variables} == {"float32"}
        assert rewrite.model.compute_output_spec(keras.KerasTensor((2, 3))).dtype == "bfloat16"


# --- other options -----------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "kind"), [(nested, "keras"), (two_towers, "truenorm")])
@pytest.mark.parametrize(
    "options",
    [{"synchronized": True}, {"momentum": 0.8, "bessel_correction": True}, {"momentum": None},
     {"virtual_batch_size": 2}, {"renorm": True, "renorm_clipping": {"rmax": 2.0}}],
)  # fmt: skip
def test_options_are_given_to_every_layer_and_the_function_stays(
    build: Callable[..., Any], kind: str, options: dict[str, Any]
) -> None:
    model = shake(build(kind))
    x = inputs_for(model)
    rewrite = tn.replace(model, **options)
    layers = layers_of(rewrite.model, tn.BatchNormalization)
    assert rewrite.left == ()
    assert len(layers) > 0
    for layer in layers:
        assert {name: getattr(layer, name) for name in options} == options
    assert rewrite.max_rel_error is not None
    assert rewrite.max_rel_error <= 1e-5
    for ours, theirs in zip(predict(rewrite.model, x), predict(model, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    old = {v.path: v for v in model.variables}
    for variable in rewrite.model.variables:
        if variable.path in old:
            np.testing.assert_array_equal(variable.numpy(), old[variable.path].numpy())
    assert {v.path for v in rewrite.model.variables} >= set(old)


def test_what_renorm_adds_begins_at_the_moving_statistics() -> None:
    model = shake(dense())
    layer = tn.replace(model, renorm=True).model.get_layer("bn")
    mean, variance = (w.numpy() for w in model.get_layer("bn").weights[2:])
    np.testing.assert_array_equal(layer.renorm_mean.numpy(), mean)
    deviation = np.sqrt(np.float64(variance) + layer.epsilon)
    for weight in (layer.renorm_stddev, layer.moving_stddev):
        np.testing.assert_allclose(weight.numpy(), deviation, rtol=1e-6)
    back = tn.replace(tn.replace(model, renorm=True).model, "keras", renorm=False).model
    assert not back.get_layer("bn").renorm
    np.testing.assert_array_equal(
        predict(back, inputs_for(model)), predict(model, inputs_for(model))
    )


def test_a_layer_that_has_the_options_or_cannot_have_them_is_left() -> None:
    inputs = keras.Input((3,))
    x = tn.BatchNormalization(name="has", momentum=0.5)(inputs)
    x = tn.BatchNormalization(name="ghosts", momentum=0.5, virtual_batch_size=2)(x)
    model = keras.Model(inputs, x)
    both = tn.replace(model, momentum=0.5)
    assert {k.reason for k in both.left} == {"it is truenorm's already, with these options"}
    one = tn.replace(model, synchronized=True)
    assert [c.path for c in one.changed] == ["has"]
    assert one.left[0].reason.startswith(
        "BatchNormalization has both virtual_batch_size and synchronized."
    )
    assert one.kind == "replace to truenorm, synchronized=True"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "batch"},
         "There is no such layer to replace by (at 'to'). Expected: 'truenorm' or 'keras' or "
         "'group' or 'layer' or 'affine'. Received: 'batch'."),
        ({"to": "layer", "groups": 2},
         "Only GroupNormalization has groups (at 'groups'). Expected: to='group', or no groups. "
         "Received: to='layer', groups=2."),
        ({"to": "affine", "momentum": 0.5},
         "momentum is not an option that layers can be given when they are replaced (at "
         "'replace(model, to='affine')'). Expected: no option of the layer. Received: "
         "momentum=0.5."),
        ({"momentum": 2},
         "`momentum` must be the weight of the old moving statistics of BatchNormalization. "
         "Expected: a number from 0 to 1, or None for the mean over all batches. Received: 2."),
    ],
)  # fmt: skip
def test_bad_use_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tn.OptionError) as caught:
        tn.replace(dense(), **arguments)
    assert str(caught.value) == message


def test_an_option_that_changes_the_function_is_refused_with_those_that_do_not() -> None:
    with pytest.raises(tn.OptionError, match=r"^epsilon is not an option that") as caught:
        tn.replace(dense(), epsilon=0.1)
    assert "synchronized" in str(caught.value)
    assert "epsilon," not in str(caught.value)


def test_conversions_are_variants_of_a_study() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 5)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")

    def build() -> Any:
        model = dense()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    result = tn.study(
        build,
        ((x[:32], y[:32]), (x[32:], y[32:])),
        variants={
            "batch": None,
            "group": lambda m: tn.replace(m, to="group", groups=2).model,
            "layer": lambda m: tn.replace(m, to="layer").model,
            "affine": lambda m: tn.replace(m, to="affine").model,
        },
        seeds=2,
        epochs=1,
        runner="here",
    )
    assert {trial.error for trial in result.trials} == {None}
    assert {trial.position for trial in result.trials} == {"batch", "group", "layer", "affine"}
