"""Files of other people read without Keras: what is found in them, and what is refused."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from altered_keras_files import CONFIG, WEIGHTS, layer_named, with_config, with_weights
from hypothesis import given
from hypothesis import strategies as st

import truenorm as tn
from truenorm import archive
from truenorm._model.graph import is_batch_normalization, layer_paths
from truenorm._records.stored_model import StoredLayer, StoredModel, StoredStatistics
from truenorm.archive._container import MOST_MEMBERS

pytestmark = pytest.mark.any_backend

EVIL = "<img src=x onerror=alert(1)>\x1b[31m[bold]\n"


def nested() -> Any:
    """A functional model with a layer that is called twice, and a Sequential, in another."""
    x = inputs = keras.Input((4,))
    for layer in [keras.layers.BatchNormalization(name="again", momentum=0.9)] * 2:
        x = layer(x)
    x = keras.layers.BatchNormalization(name="once", epsilon=1e-5)(x)
    inner = keras.Model(inputs, x, name="inner")
    chain = [
        keras.Input((4,)),
        tn.BatchNormalization(name="held", freeze="statistics"),
        keras.layers.ReLU(),
    ]
    outer = keras.Input((4,))
    x = keras.Sequential(chain, name="chain")(inner(outer))
    return keras.Model(outer, keras.layers.BatchNormalization(name="last")(x), name="outer")


def timewise() -> Any:
    """A BatchNormalization in a wrapper, in 16 bits and without gamma; one without beta, frozen."""
    layers = [
        keras.layers.TimeDistributed(
            keras.layers.BatchNormalization(name="inner", scale=False, dtype="bfloat16")
        ),
        keras.layers.BatchNormalization(name="frozen", center=False, trainable=False, axis=1),
    ]
    return keras.Sequential([keras.Input((3, 4)), *layers], name="timewise")


def twice() -> Any:
    """One layer in two models, which both are in a third."""
    shared = keras.layers.BatchNormalization(name="shared")
    parts = [keras.Sequential([keras.Input((4,)), shared], name=name) for name in ("a", "b")]
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Add()([part(inputs) for part in parts]), name="twice")


@pytest.mark.parametrize("build", [nested, timewise])
def test_reading_finds_what_the_model_has(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build()
    layers = {p: k for k, p in layer_paths(model).items() if is_batch_normalization(k)}
    generator = np.random.default_rng(0)
    for layer in layers.values():
        layer.moving_mean.assign(generator.integers(-8, 8, layer.moving_mean.shape))
        layer.moving_variance.assign(generator.integers(1, 8, layer.moving_variance.shape))
    archive.save(model, tmp_path / "model.keras")
    read = archive.read(tmp_path / "model.keras")
    assert (read.model, read.keras, read.hidden) == (model.name, keras.__version__, ())
    found = {one.path: one for one in read.layers}
    assert set(layers) == set(found)
    policies = {"frozen": "all", "held": "statistics"}
    for path, layer in layers.items():
        mean = np.asarray(keras.ops.convert_to_numpy(layer.moving_mean), "float64")
        variance = np.asarray(keras.ops.convert_to_numpy(layer.moving_variance), "float64")
        one, statistics = found[path], found[path].statistics
        package = type(layer).__module__.split(".")[0]
        assert (one.layer, one.channels) == (f"{package}.BatchNormalization", len(mean))
        assert (one.momentum, one.epsilon) == (layer.momentum, layer.epsilon)
        assert one.trainable == layer.trainable
        assert one.policy == policies.get(layer.name, "none")
        assert one.dtype == layer.dtype_policy.name
        assert one.axis in (layer.axis, -1)
        assert statistics.largest_mean == abs(mean).max()
        assert (statistics.least_variance, statistics.largest_variance) == (
            variance.min(), variance.max())  # fmt: skip


def test_a_compressed_archive_reads_as_a_plain_one(file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.keras"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert archive.read(packed) == archive.read(file)


def test_a_layer_in_two_models_is_stored_with_the_first(tmp_path: Path) -> None:
    archive.save(twice(), tmp_path / "twice.keras")
    read = archive.read(tmp_path / "twice.keras")
    assert [one.path for one in read.layers] == ["a/shared"]
    assert [one.path for one in read.hidden] == ["b/shared"]


def test_statistics_are_told_apart(file: Path, tmp_path: Path) -> None:
    place = "layers/batch_normalization/vars"

    def initial(variables: h5py.File) -> None:
        variables[f"{place}/2"][...] = 0
        variables[f"{place}/3"][...] = 1

    def broken(variables: h5py.File) -> None:
        variables[f"{place}/2"][0] = np.nan
        variables[f"{place}/3"][1:3] = -1, np.inf

    path = with_weights(file, initial, tmp_path / "initial.keras")
    assert archive.read(path).layers[0].statistics.describe() == "as initialised"
    found = archive.read(with_weights(file, broken, tmp_path / "broken.keras")).layers[0].statistics
    assert (found.initial, found.non_finite, found.negative) == (False, 2, 1)
    assert found.describe().startswith("2 channels not finite, 1 channel negative, |mean| up to")


def duplicate(target: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(target, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            new.writestr(CONFIG, b"{}")


def write_with(name: str, *, mode: int = 0, content: bytes = b"/etc/passwd") -> Any:
    def write(target: Path, members: dict[str, bytes]) -> None:
        extra = zipfile.ZipInfo(name)
        extra.external_attr = mode << 16
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
            new.writestr(extra, content, zipfile.ZIP_DEFLATED)
            for kept, its in members.items():
                new.writestr(kept, its)

    return write


def overlapping(target: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(target, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
        twin = zipfile.ZipInfo("assets/twin")
        like = new.getinfo(WEIGHTS)
        for key in ("header_offset", "CRC", "compress_size", "file_size"):
            setattr(twin, key, getattr(like, key))
        new.filelist.append(twin)


def many(target: Path, _: dict[str, bytes]) -> None:
    with zipfile.ZipFile(target, "w") as new:
        for index in range(MOST_MEMBERS + 1):
            new.writestr(f"assets/{index}", b"")


def deep(target: Path, _: dict[str, bytes]) -> None:
    with zipfile.ZipFile(target, "w") as new:
        new.writestr(CONFIG, '{"a\\"[": ' + "[" * 200_000 + "]" * 200_000 + "}")


def no_object(target: Path, _: dict[str, bytes]) -> None:
    with zipfile.ZipFile(target, "w") as new:
        new.writestr(CONFIG, '"' + '\\"' * 100_000)  # a string that does not end


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (duplicate, "config.json'). Expected: each member once. Received: two of this name."),
        (write_with("../evil"), "../evil'). Expected: a path inside the archive."),
        (write_with("/evil"), "/evil'). Expected: a path inside the archive."),
        (write_with("a\\..\\evil"), "Expected: a path inside the archive."),
        (write_with("c:/evil"), "c:/evil'). Expected: a path inside the archive."),
        (write_with("assets/a", mode=stat.S_IFLNK | 0o777), "a link or a special file"),
        (write_with("assets/a", content=bytes(2**26)), "bytes at most. Received: 67"),
        (overlapping, "Received: members that overlap"),
        (many, "Expected: 10000 at most. Received: 10001."),
        (deep, "Expected: JSON nested 200 deep at most. Received: 200001."),
        (no_object, "The file is damaged or not a .keras file"),
    ],
)
def test_an_archive_made_to_do_harm_is_refused(
    write: Any, message: str, file: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    target = tmp_path / "evil.keras"
    write(target, members)
    assert target.stat().st_size < 2**21
    for opening in (archive.read, archive.load):
        with pytest.raises(tn.ArchiveError) as refused:
            opening(target)
        assert message in str(refused.value)


def external_link(variables: h5py.File) -> None:
    variables["layers/link"] = h5py.ExternalLink("/etc/passwd", "/")


def soft_link(variables: h5py.File) -> None:
    variables["layers/batch_normalization/vars/4"] = h5py.SoftLink("/layers/dense/vars/0")


def external_data(variables: h5py.File) -> None:
    variables.create_dataset("other", (4,), "u1", external=[("/etc/passwd", 0, 4)])


def virtual_data(variables: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    variables.create_virtual_dataset("other", layout)


def shape_bomb(variables: h5py.File) -> None:
    variables.create_dataset("other", (10**9,), "f4", chunks=(1000,))


def missing(variables: h5py.File) -> None:
    del variables["layers/batch_normalization/vars/3"]


def other_length(variables: h5py.File) -> None:
    del variables["layers/batch_normalization/vars/3"]
    variables["layers/batch_normalization/vars/3"] = np.ones(5, "f4")


def all_of_other_length(variables: h5py.File) -> None:
    for index in range(4):
        del variables[f"layers/batch_normalization/vars/{index}"]
        variables[f"layers/batch_normalization/vars/{index}"] = np.ones(5, "f4")


def a_matrix(variables: h5py.File) -> None:
    del variables["layers/batch_normalization/vars/3"]
    variables["layers/batch_normalization/vars/3"] = np.ones((2, 3), "f4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external_link, "model.weights.h5/layers/link'). Expected: data in the file itself. "
                        "Received: ExternalLink."),
        (soft_link, "Received: SoftLink."),
        (external_data, "Received: data that is kept elsewhere."),
        (virtual_data, "Received: data that is kept elsewhere."),
        (shape_bomb, "Expected: 4000000000 bytes, as declared. Received: 0 stored."),
        (missing, "A variable of this layer is missing (at 'bn'). Expected: "
                  "model.weights.h5/layers/batch_normalization/vars/3."),
        (other_length, "(at 'bn'). Expected: one value per channel in each. "
                       "Received: lengths [5, 6]."),
        (all_of_other_length, "Received: lengths [5, 6]."),
        (a_matrix, "Received: shape (2, 3), dtype float32."),
    ],
)  # fmt: skip
def test_variables_elsewhere_or_amiss_are_refused(
    change: Any, message: str, file: Path, tmp_path: Path
) -> None:
    path = with_weights(file, change, tmp_path / "evil.keras")
    with pytest.raises(tn.ArchiveError) as refused:
        archive.read(path)
    assert message in str(refused.value)
    with pytest.raises(tn.ArchiveError):
        archive.load(path)


def test_a_group_that_is_in_itself_is_no_endless_walk(file: Path, tmp_path: Path) -> None:
    def circle(variables: h5py.File) -> None:
        variables["layers/again"] = variables["layers"]

    read = archive.read(with_weights(file, circle, tmp_path / "circle.keras"))
    assert read.layers == archive.read(file).layers


def test_a_truncated_file_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for length in range(0, len(content), len(content) // 40):
        (tmp_path / "short.keras").write_bytes(content[:length])
        with pytest.raises(tn.ArchiveError, match=r"damaged or not a \.keras file"):
            archive.read(tmp_path / "short.keras")


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_without_effect(file: Path, where: float, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    flipped = file.with_name("flipped.keras")
    flipped.write_bytes(content)
    try:
        layers = archive.read(flipped).layers
    except tn.ArchiveError:
        return
    assert layers == archive.read(file).layers


def test_other_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(tn.ArchiveError, match=r"Expected: a \.keras file, or isolate=True"):
        archive.load(tmp_path / "model.h5")
    with pytest.raises(tn.ArchiveError, match=r"There is no such \.keras file"):
        archive.read(tmp_path / "none.keras")
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(tn.ArchiveError, match="Received: a folder"):
        archive.read(tmp_path / "folder.keras")


def a_stranger(config: Any) -> None:
    layer_named(config, "relu").update({"module": "os", "class_name": "system"})


def test_reading_says_what_it_could_not_look_into(file: Path, tmp_path: Path) -> None:
    read = archive.read(with_config(file, a_stranger, tmp_path / "custom.keras"))
    assert [one.path for one in read.layers] == ["bn"]
    assert "Not looked into: relu, of a class that is not Keras's: system." in str(read)


def test_names_are_shown_and_not_obeyed(file: Path, tmp_path: Path) -> None:
    def rename(config: Any) -> None:
        layer_named(config, "bn")["config"]["name"] = EVIL

    read = archive.read(with_config(file, rename, tmp_path / "evil.keras"))
    assert read.layers[0].path == EVIL
    printed = str(read)
    assert "\x1b" not in printed
    assert "[bold]" in printed.replace("│", "").replace("\n", "").replace(" ", "")
    assert "<img" not in read._repr_html_()
    assert json.loads(read.to_json())["layers"][0]["path"] == EVIL


def test_layers_that_are_alike_share_a_row() -> None:
    """With the range of each number; one whose statistics have a fault has a row of its own."""
    fine = StoredStatistics(False, 0, 0, 2.0, 0.5, 3.0)
    other = replace(fine, largest_mean=4.0, least_variance=0.25)
    bad = replace(fine, negative=2)
    layers = tuple(
        StoredLayer(name, "keras.BatchNormalization", -1, 8 * k, 0.99, 1e-3, True, "none", "f4", s)
        for k, (name, s) in enumerate({"a": fine, "b": other, "c": bad}.items(), 1)
    )
    (table,) = StoredModel("m", None, None, layers).tables()
    assert [(row[0], row[3], row[-1]) for row in table.rows] == [
        ("a, b", "8–16", "|mean| up to 4, variance 0.25 to 3"),
        ("c", "24", "2 channels negative, |mean| up to 2, variance 0.5 to 3"),
    ]
