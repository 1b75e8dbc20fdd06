"""Every family of keras.applications, and backbones of KerasHub, through the rewrites."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any

import keras
import numpy as np
import pytest
from keras_architectures import (
    FAMILIES,
    error,
    images_for,
    model_of,
    outputs_of,
    quick_initial_values,
)
from small_models import predict, shake

import truenorm as tn
from truenorm._model.rebuild import rebuild

pytestmark = pytest.mark.any_backend

BatchNormalization = keras.layers.BatchNormalization


def families(names: list[str]) -> Any:
    """One test for each, of which the expensive ones run with ``-m long`` only."""

    def marks(name: str) -> list[Any]:
        missing = name == "NASNetMobile" and keras.config.backend() == "torch"
        found: list[Any] = [pytest.mark.xdist_group(name)]
        found += [] if FAMILIES[name].cheap else [pytest.mark.long]
        return found + [pytest.mark.skip("Keras has it not on torch")] * missing

    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in names])


WITH = [name for name, family in FAMILIES.items() if family.sites]
WITHOUT = [name for name, family in FAMILIES.items() if not family.sites]


@pytest.fixture(autouse=True)
def _quick_initial_values() -> Generator[None]:
    with quick_initial_values():
        yield


def test_no_family_is_forgotten() -> None:
    """Keras has a file for each."""
    files = {f.__module__ for f in vars(keras.applications).values() if inspect.isfunction(f)}
    assert files == {getattr(keras.applications, name).__module__ for name in FAMILIES}


@families(list(FAMILIES))
def test_a_rebuilt_model_is_the_same(name: str) -> None:
    model = model_of(name)
    new = rebuild(model)
    assert new.get_config() == model.get_config()
    for ours, theirs in zip(new.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    np.testing.assert_array_equal(predict(new, images_for(name))[0], outputs_of(name))


@families(WITH)
def test_a_folded_model_computes_the_same_with_fewer_layers(name: str) -> None:
    model, family = model_of(name), FAMILIES[name]
    rewrite = tn.fold(model, probe=images_for(name))
    left = dict.fromkeys(family.left, 0)
    for site in rewrite.left:
        (reason,) = (reason for reason in left if reason in site.reason)
        left[reason] += 1
    assert left == family.left
    assert len(rewrite.changed) == family.sites - sum(left.values())
    assert len(rewrite.model.layers) == len(model.layers) - len(rewrite.changed)
    assert error(rewrite.model, name) <= 1e-4


@families(WITH)
def test_a_model_with_our_layer_computes_the_same_and_goes_back(name: str) -> None:
    model = model_of(name)
    rewrite = tn.replace(model, "truenorm", probe=images_for(name))
    assert (len(rewrite.changed), rewrite.left) == (FAMILIES[name].sites, ())
    ours = [type(k) for k in rewrite.model.layers if isinstance(k, BatchNormalization)]
    assert set(ours) == {tn.BatchNormalization}
    assert error(rewrite.model, name) <= 1e-5
    back = tn.replace(rewrite.model, "keras", probe=images_for(name)).model
    assert back.get_config() == model.get_config()


@families(WITHOUT)
def test_what_has_no_batch_normalization_is_refused(name: str) -> None:
    for tool in (tn.fold, lambda model: tn.replace(model, "truenorm")):
        with pytest.raises(tn.ModelError, match=r"^This model has no BatchNormalization"):
            tool(model_of(name))


# --- models of classes with a constructor of their own ------------------------------------------


@keras.saving.register_keras_serializable("test_families")
class Backbone(keras.Model):
    """As those of KerasHub: a functional model that is made from a few numbers."""

    def __init__(self, widths: list[int], **options: Any) -> None:
        inputs = x = keras.Input((6, 6, 3))
        for i, width in enumerate(widths):
            x = keras.layers.Conv2D(width, 3, padding="same", name=f"conv{i}")(x)
            x = BatchNormalization(name=f"bn{i}")(x)
            x = keras.layers.ReLU(name=f"relu{i}")(x)
        x = keras.ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        super().__init__(inputs, x, **options)
        self.widths = widths

    def get_config(self) -> dict[str, Any]:
        return {"widths": list(self.widths), "name": self.name, "trainable": self.trainable}


def assert_rebuilt(model: Any) -> Any:
    new = rebuild(model)
    assert type(new) is type(model)
    assert new.get_config() == model.get_config()
    assert [layer.name for layer in new.layers] == [layer.name for layer in model.layers]
    assert [w.path for w in new.weights] == [w.path for w in model.weights]
    x = np.random.default_rng(0).normal(size=(2, *model.inputs[0].shape[1:]))
    ours, theirs = (keras.tree.flatten(m(x.astype("float32"))) for m in (new, model))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(*(np.array(keras.ops.convert_to_numpy(y)) for y in (a, b)))
    flags = [[layer.trainable for layer in m._flatten_layers()] for m in (new, model)]
    assert flags[0] == flags[1]
    return new


def test_a_class_with_its_own_constructor_stays_where_nothing_changes() -> None:
    backbone = shake(Backbone([4, 5], name="backbone"))
    backbone.get_layer("conv0").trainable = False
    assert assert_rebuilt(backbone).widths == [4, 5]
    head: Any = BatchNormalization(name="head")
    model: Any = keras.Sequential([backbone, keras.layers.GlobalAveragePooling2D(), head])
    shake(model)
    assert_rebuilt(model)
    folded = tn.replace(model, "truenorm").model
    assert type(folded.get_layer("backbone")) is not Backbone
    only_head = tn.fold(model, where="head").model
    assert type(only_head.get_layer("backbone")) is Backbone


def test_a_class_keeps_what_its_constructor_would_not_make() -> None:
    """A layer was changed after the construction, or is called from outside too."""
    changed: Any = shake(Backbone([4], name="backbone"))
    changed.get_layer("relu0").negative_slope = 0.5
    backbone: Any = shake(Backbone([3], name="backbone"))
    inputs = keras.Input((6, 6, 3))
    shared: Any = keras.Model(inputs, backbone(backbone.get_layer("conv0")(inputs)))
    for model, copy in ((changed, rebuild(changed)), (shared, rebuild(shared))):
        assert [type(k) for k in copy._flatten_layers()] == [
            type(k) for k in model._flatten_layers()
        ]
        x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype("float32")
        np.testing.assert_array_equal(predict(copy, x)[0], predict(model, x)[0])
    conv = rebuild(shared)._flatten_layers()
    assert sum(isinstance(layer, keras.layers.Conv2D) for layer in conv) == 1


def test_a_class_keeps_a_constant_that_its_config_lacks() -> None:
    class Scaled(keras.Model):
        def __init__(self, factor: float = 2.0, **options: Any) -> None:
            inputs = keras.Input((3,))
            super().__init__(inputs, keras.layers.Dense(3, name="d")(inputs) * factor, **options)

        def get_config(self) -> dict[str, Any]:
            return {"name": self.name}

    model: Any = Scaled(5.0, name="scaled")
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(predict(rebuild(model), x)[0], predict(model, x)[0])


# --- KerasHub's, where it is installed -----------------------------------------------------------

STAGES = {"stackwise_num_blocks": [1, 2], "stackwise_num_strides": [1, 2]}
KERAS_HUB: dict[str, tuple[dict[str, Any], int, int]] = {
    "ResNetBackbone": (
        {"input_conv_filters": [8], "input_conv_kernel_sizes": [7], "image_shape": (32, 32, 3),
         "stackwise_num_filters": [64, 16], "block_type": "bottleneck_block",
         "use_pre_activation": True, **STAGES},
        7, 3,
    ),
    "EfficientNetBackbone": (
        {"stackwise_width_coefficients": [1.0] * 3, "stackwise_depth_coefficients": [1.0] * 3,
         "stackwise_squeeze_and_excite_ratios": [0.25] * 3, "stackwise_kernel_sizes": [3, 3, 5],
         "stackwise_num_repeats": [1, 2, 1], "stackwise_input_filters": [8, 8, 16],
         "stackwise_output_filters": [8, 16, 16], "stackwise_expansion_ratios": [1, 6, 6],
         "stackwise_strides": [1, 2, 2], "stackwise_block_types": ["v1"] * 3,
         "input_shape": (32, 32, 3)},
        13, 0,
    ),
    "DenseNetBackbone": (
        {"stackwise_num_repeats": [2, 2], "growth_rate": 8, "image_shape": (32, 32, 3)}, 5, 6,
    ),
    "XceptionBackbone": (
        {"stackwise_conv_filters": [[8, 8], [16, 16]], "stackwise_pooling": [True, False],
         "image_shape": (64, 64, 3)},
        4, 0,
    ),
}  # fmt: skip
"""Constructor, sites that fold, and sites that stay."""


@pytest.mark.parametrize("name", KERAS_HUB)
def test_backbones_of_keras_hub(name: str) -> None:
    keras_hub = pytest.importorskip("keras_hub")
    options, folds, stays = KERAS_HUB[name]
    backbone = shake(getattr(keras_hub.models, name)(**options), spread=0.25)
    assert_rebuilt(backbone)
    x = np.random.default_rng(0).normal(size=(4, *backbone.inputs[0].shape[1:])).astype("float32")
    (expected,) = predict(backbone, x)
    for rewrite, changed, left in (
        (tn.fold(backbone), folds, stays),
        (tn.replace(backbone, "truenorm"), folds + stays, 0),
    ):
        assert (len(rewrite.changed), len(rewrite.left)) == (changed, left)
        difference = np.abs(predict(rewrite.model, x)[0] - expected).max()
        assert difference <= 1e-4 * np.ptp(expected)
