"""Models in the old format: read without Keras, translated, and loaded in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import small_models as models

import truenorm as tn
from truenorm import archive
from truenorm.archive._keras2 import translated

pytestmark = pytest.mark.any_backend


def layer(kind: str, name: str, feeds: str | None, **config: Any) -> dict[str, Any]:
    """As Keras 2 wrote it into a functional model."""
    nodes = [[[feeds, 0, 0, {}]]] if feeds else []
    config = {"name": name, "trainable": True, "dtype": "float32", **config}
    return {"class_name": kind, "config": config, "name": name, "inbound_nodes": nodes}


def old_config() -> dict[str, Any]:
    """A functional model of Keras 2.4, with settings that Keras 3 does not have."""
    glorot = {"class_name": "GlorotUniform", "config": {"seed": None, "dtype": "float32"}}
    picture = layer("InputLayer", "image", None, batch_input_shape=[None, 6, 6, 3], sparse=False,
                    ragged=False)  # fmt: skip
    picture["config"].pop("trainable")
    layers = [
        picture,
        layer("Conv2D", "conv", "image", filters=4, kernel_size=[3, 3], padding="same", groups=1,
              use_bias=False, kernel_initializer=glorot),
        layer("BatchNormalization", "bn", "conv", axis=[3], momentum=0.9, epsilon=0.001,
              fused=True, renorm=False, virtual_batch_size=None),
        layer("Activation", "relu", "bn", activation="relu"),
        layer("DepthwiseConv2D", "depthwise", "relu", kernel_size=[3, 3], groups=1),
        layer("BatchNormalizationV1", "bn2", "depthwise", axis=[3], scale=False),
    ]  # fmt: skip
    config = {
        "name": "old",
        "layers": layers,
        "input_layers": [["image", 0, 0]],
        "output_layers": [["bn2", 0, 0]],
    }
    return {"class_name": "Functional", "config": config}


VALUES: dict[str, dict[str, np.ndarray]] = {
    "conv": {"kernel:0": np.linspace(-1, 1, 108).reshape(3, 3, 3, 4)},
    "bn": {
        "gamma:0": np.array([1, 2, 3, 4]),
        "beta:0": np.array([0, 1, 0, 1]),
        "moving_mean:0": np.array([-5, 0, 1, 2]),
        "moving_variance:0": np.array([1, 2, 3, 9]),
    },
    "depthwise": {
        "depthwise_kernel:0": np.ones((3, 3, 4, 1)),
        "bias:0": np.zeros(4),
    },
    "bn2": {
        "beta:0": np.zeros(4),
        "moving_mean:0": np.array([1, 2, 3, 4]),
        "moving_variance:0": np.array([1, 1, 1, 7]),
    },
}


def written(path: Path, config: dict[str, Any]) -> Path:
    """A file as Keras 2 wrote it."""
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = np.bytes_(json.dumps(config))
        file.attrs["keras_version"] = np.bytes_("2.4.0")
        weights = file.create_group("model_weights")
        weights.attrs["keras_version"] = np.bytes_("2.4.0")
        names = [one["config"]["name"] for one in config["config"]["layers"]]
        weights.attrs["layer_names"] = np.array([name.encode() for name in names])
        for name in names:
            group = weights.create_group(name)
            stored = {f"{name}/{own}": value for own, value in VALUES.get(name, {}).items()}
            group.attrs["weight_names"] = np.array([one.encode() for one in stored], dtype="S40")
            for own, value in stored.items():
                group[own] = value.astype("f4")
    return path


def test_an_old_file_is_read_without_keras(tmp_path: Path) -> None:
    read = archive.read(written(tmp_path / "old.h5", old_config()))
    assert (read.model, read.keras, read.hidden) == ("old", "2.4.0", ())
    one, two = read.layers
    assert (one.path, one.axis, one.channels, one.momentum) == ("bn", 3, 4, 0.9)
    assert (two.path, two.axis, two.channels) == ("bn2", 3, 4)
    assert one.statistics.largest_mean == 5
    assert (two.statistics.least_variance, two.statistics.largest_variance) == (1, 7)


def test_an_old_file_is_translated_and_loaded(tmp_path: Path) -> None:
    path = written(tmp_path / "old.h5", old_config())
    before = path.read_bytes()
    with pytest.raises(tn.ArchiveError) as refused:
        archive.load(path)
    assert str(refused.value) == (
        f"Models in the old format are opened in a separate process only (at '{path}'). "
        "Expected: a .keras file, or isolate=True (--isolate)."
    )
    model = archive.load(path, isolate=True)
    assert path.read_bytes() == before
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype("f4")
    found = models.predict(model, x)[0]
    first, second = (VALUES[name] for name in ("bn", "bn2"))
    conv = np.zeros((2, 6, 6, 4))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i in range(3):
        for j in range(3):
            conv += padded[:, i : i + 6, j : j + 6] @ VALUES["conv"]["kernel:0"][i, j]
    y = (conv - first["moving_mean:0"]) / np.sqrt(first["moving_variance:0"] + 1e-3)
    y = np.maximum(first["gamma:0"] * y + first["beta:0"], 0)
    y = sum(y[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3))
    y = (y - second["moving_mean:0"]) / np.sqrt(second["moving_variance:0"] + 1e-3)
    np.testing.assert_allclose(found, y, rtol=1e-3, atol=1e-3)


def nested_model() -> Any:
    inner = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(6), keras.layers.BatchNormalization(name="deep")],
        name="inner",
    )
    return keras.Sequential([keras.Input((5,)), inner, keras.layers.BatchNormalization(name="top")])


def test_the_old_format_of_keras_3_is_read_as_the_new_one(tmp_path: Path) -> None:
    model = models.shake(nested_model())
    model.save(tmp_path / "m.h5")
    archive.save(model, tmp_path / "m.keras")
    old, new = archive.read(tmp_path / "m.h5"), archive.read(tmp_path / "m.keras")
    assert [(one.path, one.channels, one.statistics) for one in old.layers] == [
        (one.path, one.channels, one.statistics) for one in new.layers
    ]
    assert [one.path for one in old.layers] == ["inner/deep", "top"]


def test_a_sequential_that_is_a_list_of_layers_is_read(tmp_path: Path) -> None:
    config = old_config()
    sequential = {"class_name": "Sequential", "config": config["config"]["layers"][1:3]}
    path = written(tmp_path / "list.h5", config)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = np.bytes_(json.dumps(sequential))
    assert [one.path for one in archive.read(path).layers] == ["bn"]


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("TensorFlowOpLayer", {"node_def": "x"}, "Received: TensorFlowOpLayer."),
        ("TFOpLambda", {"function": "math.add"}, "Received: TFOpLambda."),
        ("BatchNormalization", {"axis": [1, 2]}, "Expected: one axis. Received: axis [1, 2]."),
        ("BatchNormalization", {"virtual_batch_size": 4}, "Received: virtual_batch_size: 4."),
        ("Conv2DTranspose", {"groups": 2}, "Expected: 1. Received: groups: 2."),
        ("LSTM", {"time_major": True}, "Expected: False. Received: time_major: True."),
    ],
)
def test_what_is_not_certain_is_named(kind: str, config: dict[str, Any], message: str) -> None:
    entry = {"class_name": kind, "config": {"name": "one", **config}}
    with pytest.raises(tn.ArchiveError) as refused:
        translated({"config": {"layers": [entry]}}, "old.h5")
    assert "something of Keras 2 whose meaning is not certain in Keras 3 (at 'old.h5: one')" in str(
        refused.value
    )
    assert message in str(refused.value)


def test_code_and_data_elsewhere_are_refused_in_the_old_format(tmp_path: Path) -> None:
    config = old_config()
    path = written(tmp_path / "old.h5", config)
    with h5py.File(path, "r+") as file:
        file["model_weights/link"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(tn.ArchiveError, match="Received: ExternalLink"):
        archive.read(path)
    config["config"]["layers"][3] = layer("Lambda", "relu", "bn", function=["4wAA", None, None])
    command = [sys.executable, "-m", "truenorm", "inspect",
               str(written(tmp_path / "code.h5", config))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert "The file holds code, which is not run" in done.stderr
    assert [one.path for one in archive.read(tmp_path / "code.h5").layers] == ["bn", "bn2"]


def test_files_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(tn.ArchiveError, match=r"There is no such \.h5 file"):
        archive.read(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(tn.ArchiveError, match=r"damaged or not a \.h5 file"):
        archive.read(tmp_path / "text.h5")
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file["x"] = np.ones(3)
    with pytest.raises(tn.ArchiveError, match="There is no model in this file, at most its w"):
        archive.read(tmp_path / "weights.h5")
    with h5py.File(tmp_path / "numbers.h5", "w") as file:
        file.attrs["model_config"] = np.ones(3)
    with pytest.raises(tn.ArchiveError, match="The configuration in the file is not as Keras"):
        archive.read(tmp_path / "numbers.h5")
