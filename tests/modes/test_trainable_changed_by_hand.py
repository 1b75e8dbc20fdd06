"""``trainable`` changed after ``compile``: what Keras does, what truenorm says, what it advises."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from small_models import LAYERS

import truenorm as tn

BACKEND = keras.config.backend()
OBEYS, GOES_ON, RAISES = "obeys", "goes on as compiled", "raises an error"
X = np.random.default_rng(0).normal(1, 2, (16, 3)).astype("float32")
Y = np.ones((16, 1), "float32")


def values(thing: Any) -> list[bytes]:
    return [np.array(keras.ops.convert_to_numpy(v)).tobytes() for v in thing.variables]


def model_of(affine: bool, trainable: bool) -> Any:
    inputs = keras.Input((3,))
    layer = keras.layers.BatchNormalization(
        scale=affine, center=affine, trainable=trainable, name="bn"
    )
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(keras.layers.Dense(3)(inputs))))
    model.compile("adam", "mse")
    return model


# What fit does, by (gamma and beta, frozen or thawed, steps before, compiled).
TENSORFLOW = {(affine, to, 1, True): GOES_ON for affine in (True, False) for to in (True, False)}
EXPECTED = {
    "tensorflow": {**TENSORFLOW, (True, True, 1, False): RAISES},
    "jax": {
        **TENSORFLOW,
        **{(True, to, 1, compiled): RAISES for to in (True, False) for compiled in (True, False)},
    },
    "torch": {(True, True, 1, compiled): RAISES for compiled in (True, False)},
}[BACKEND]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("to", [False, True])
@pytest.mark.parametrize("affine", [True, False])
def test_fit_does_what_truenorm_says_it_does(
    affine: bool, to: bool, steps: int, compiled: bool
) -> None:
    model = model_of(affine, not to)
    layer = model.get_layer("bn")
    for _ in range(steps):
        model.fit(X, Y, verbose=0)
    layer.trainable = to
    expected, other = (
        EXPECTED.get((affine, to, steps, how), OBEYS) for how in (compiled, not compiled)
    )
    before = values(layer)
    raising = pytest.raises(ValueError) if expected == RAISES else nullcontext()  # noqa: PT011
    with tn.observe(model) as seen, nullcontext() if compiled else raising:
        if not compiled:
            model.fit(X, Y, verbose=0)
    said = (other, expected) if compiled else (expected, other)
    assert "Uncompiled, as here, fit {}; else fit {}. If the".format(*said) in seen.notes[0]
    if compiled:
        with raising:
            model.fit(X, Y, verbose=0)
    if expected != RAISES:
        learns = to if expected == OBEYS else not to
        assert (values(layer) != before) == learns


@pytest.mark.parametrize("to", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_freeze_and_unfreeze_make_the_change_hold(to: bool, steps: int) -> None:
    model = model_of(True, not to)
    layer = model.get_layer("bn")
    for _ in range(steps):
        model.fit(X, Y, verbose=0)
    layer.trainable = to
    (tn.unfreeze if to else tn.freeze)(model)
    assert "changed_after_compile" not in {one.code for one in tn.inspect(model, X).surprises}
    before = values(layer)
    model.fit(X, Y, verbose=0)
    assert all(a != b for a, b in zip(values(layer), before, strict=True)) == to
    assert (values(layer) != before) == to


# --- the recipe for GANs ------------------------------------------------------------------------


def gan(kind: str = "keras", steps: int = 0) -> tuple[Any, Any, Any]:
    """A discriminator that is compiled, then frozen, then part of a combined model."""
    generator = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), LAYERS[kind](name="g_bn")], name="generator"
    )
    discriminator = keras.Sequential(
        [keras.Input((3,)), LAYERS[kind](name="d_bn"), keras.layers.Dense(1)],
        name="discriminator",
    )
    discriminator.compile("adam", "mse")
    for _ in range(steps):
        discriminator.train_on_batch(X, Y)
    discriminator.trainable = False
    combined = keras.Sequential([keras.Input((4,)), generator, discriminator], name="combined")
    combined.compile("adam", "mse")
    return generator, discriminator, combined


NOISE = np.random.default_rng(1).normal(size=(16, 4)).astype("float32")


def learns(model: Any, part: Any, x: Any) -> bool:
    """Whether every variable of a part changes in a step of the model."""
    before = values(part)
    model.train_on_batch(x, Y)
    return all(a != b for a, b in zip(values(part), before, strict=True))


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
@pytest.mark.parametrize("steps", [0, 1])
def test_the_usual_recipe_does_not_train_the_discriminator_in_keras_3(steps: int) -> None:
    """So that a version that does is noticed: then TN402 can say so."""
    generator, discriminator, combined = gan(steps=steps)
    if steps and BACKEND == "jax":
        with pytest.raises(ValueError, match="trainable_variables"):
            discriminator.train_on_batch(X, Y)
    else:
        assert learns(discriminator, discriminator, X) == (steps == 1 and BACKEND == "tensorflow")
    before = values(discriminator)
    assert learns(combined, generator, NOISE)
    assert values(discriminator) == before


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_truenorm_advises_trains_both_and_no_other_advice_is_given(
    kind: str, steps: int
) -> None:
    generator, discriminator, combined = gan(kind, steps)
    assert not [s for s in tn.inspect(combined).surprises if s.code == "changed_after_compile"]
    advice = [
        s.explanation
        for s in tn.inspect(discriminator).surprises
        if s.code == "changed_after_compile"
    ]
    fit = OBEYS if not steps else {"jax": RAISES, "tensorflow": GOES_ON}.get(BACKEND, OBEYS)
    assert advice == [
        f"trainable is False, and was True when the model was compiled: fit {fit}. If the change "
        "is meant for this model, make it with truenorm's freeze or unfreeze. If it is meant only "
        "for a model that contains this one (a GAN's, which freezes the discriminator), set "
        "trainable back before each step of this model, and do not compile it again"
    ]
    for _ in range(2):
        discriminator.trainable = True
        assert learns(discriminator, discriminator, X)
        discriminator.trainable = False
        before = values(discriminator)
        assert learns(combined, generator, NOISE)
        assert values(discriminator) == before
