"""The tools on the architectures that use BatchNormalization everywhere (random weights)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
from keras_architectures import FAMILIES, error, images_for, model_of, quick_initial_values
from small_models import predict

import truenorm as tn


@dataclass(frozen=True)
class Expected:
    """Counts of sites, from the architectures' own definitions in ``keras.applications``."""

    movable: int
    left_before: dict[str, int]


ARCHITECTURES = {
    "ResNet50": Expected(33, {"Add": 20}),
    "InceptionV3": Expected(94, {}),
    "Xception": Expected(24, {"Add": 12, "MaxPooling2D": 4}),
}
pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.long,
    # Each by one worker, which makes and compiles it once.
    pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ARCHITECTURES]
    ),
]


@pytest.fixture(autouse=True)
def _quick_initial_values() -> Generator[None]:
    with quick_initial_values():
        yield


def images(name: str, samples: int) -> np.ndarray:
    shape = (samples, *images_for(name).shape[1:])
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def test_replace_keeps_the_outputs(name: str) -> None:
    rewrite = tn.replace(model_of(name), to="truenorm", probe=images_for(name))
    assert (len(rewrite.changed), len(rewrite.left)) == (FAMILIES[name].sites, 0)
    assert error(rewrite.model, name) <= 1e-5


def test_place_moves_what_can_be_moved_and_says_why_the_others_stay(name: str) -> None:
    expected = ARCHITECTURES[name]
    rewrite = tn.place(model_of(name), "after_activation")
    assert len(rewrite.changed) == expected.movable
    left: dict[str, int] = {}
    for site in rewrite.left:
        start = "not directly followed by an activation, but by "
        assert site.reason.startswith(start)
        kind = site.reason.removeprefix(start).split()[0]
        left[kind] = left.get(kind, 0) + 1
    assert left == expected.left_before
    back = tn.place(rewrite.model, "before_activation").model
    assert back.get_config() == model_of(name).get_config()


def test_the_moved_model_trains(name: str) -> None:
    """Two kinds of images that differ in brightness; few, so the loss goes down unevenly."""
    moved = tn.place(model_of(name), "after_activation").model
    model: Any = keras.Sequential([moved, keras.layers.Dense(2, activation="softmax", name="head")])
    model.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    y = np.arange(16) % 2
    x = images(name, 16) + y[:, None, None, None]
    before = {w.path: np.array(w.numpy()) for w in moved.weights}
    losses = model.fit(x, y, batch_size=8, epochs=8, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert min(losses) < 0.7 * losses[0]
    unchanged = [w.path for w in moved.weights if np.array_equal(w.numpy(), before[w.path])]
    assert not unchanged


def test_fold_removes_every_site_and_keeps_the_outputs(name: str) -> None:
    rewrite = tn.fold(model_of(name), probe=images_for(name))
    assert (len(rewrite.changed), len(rewrite.left)) == (FAMILIES[name].sites, 0)
    assert not any(
        isinstance(layer, keras.layers.BatchNormalization) for layer in rewrite.model.layers
    )
    assert error(rewrite.model, name) <= 1e-4


def test_every_site_is_found_with_its_mode(name: str) -> None:
    inspection = tn.inspect(model_of(name), images_for(name))
    expected = ARCHITECTURES[name]
    assert len(inspection.sites) == FAMILIES[name].sites
    assert {m.describe() for m in inspection.modes["predict"]} == {"moving"}
    assert {(m.statistics, m.updated) for m in inspection.modes["fit"]} == {("batch", True)}
    assert len(str(inspection).splitlines()) < 50  # alike sites are one line
    named = [s for s in inspection.sites if s.position in ("before_activation", "before_layer")]
    assert len(named) == expected.movable


def test_the_position_costs_foldable_sites(name: str) -> None:
    """A BN behind its activation folds forward only where no padded convolution follows."""
    moved = tn.place(model_of(name), "after_activation").model
    x = images_for(name)
    rewrite = tn.fold(moved, probe=x)
    assert rewrite.left
    ours, theirs = predict(rewrite.model, x)[0], predict(moved, x)[0]
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs - theirs.mean(axis=0)).max()


def test_the_classical_fine_tuning_recipe(name: str) -> None:
    """A new head, then the top of the backbone, with every BatchNormalization kept frozen."""
    base = tn.replace(model_of(name), to="keras").model  # a copy
    model: Any = keras.Sequential([base, keras.layers.Dense(1, name="head")])
    x, y = images(name, 4), np.arange(4.0)

    def fit() -> set[str]:
        """Train, and give the layers that changed."""
        before = {w.path: w.numpy().tobytes() for w in base.weights}
        model.compile(keras.optimizers.SGD(1e-2), "huber")
        head = model.get_layer("head").kernel.numpy().tobytes()
        model.fit(x, y, batch_size=4, verbose=0)
        assert model.get_layer("head").kernel.numpy().tobytes() != head
        return {w.path.split("/")[0] for w in base.weights if w.numpy().tobytes() != before[w.path]}

    base.trainable = False
    assert fit() == set()
    base.trainable = True
    top = {layer.name for layer in base.layers[-20:]}
    for layer in base.layers:
        layer.trainable = layer.name in top
    tn.freeze(model)
    kernels = {w.path.split("/")[0] for w in base.trainable_weights}
    assert kernels
    assert fit() == kernels
    assert not any("bn" in layer or "batch" in layer for layer in kernels)
