"""What can be studied: variants, data and models of any kind, in trials made here."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import truenorm as tn
from truenorm import archive
from truenorm._records.study import Trial
from truenorm._study.datasets import Parts, Ready
from truenorm._study.experiment import study
from truenorm._study.folder import Spec
from truenorm._study.models import build_of
from truenorm._study.plan import Plan
from truenorm._study.trial import Training, run
from truenorm._study.variants import Variant, variants_of

pytestmark = pytest.mark.any_backend

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def build() -> Any:
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def data(seed: int) -> Any:
    order = np.random.default_rng(seed).permutation(48)
    x, y = X[order], Y[order]
    return (x[:32], y[:32]), (x[32:40], y[32:40]), (x[40:], y[40:])


def trial(
    variant: Any = None,
    make: Callable[..., Any] = build,
    data: Callable[..., Any] = data,
    callbacks: Callable[[], Any] | None = None,
    epochs: int = 2,
    **options: Any,
) -> Trial:
    """One trial in this process."""
    named = {"it": variant if isinstance(variant, Variant) else Variant(variant)}
    policy = keras.config.dtype_policy().name
    spec = Spec("id", "it", 3, epochs, 8, True, False, False, keras.config.floatx(), policy)
    spec = Spec(**{**vars(spec), **options})
    return run(
        Training(Plan(make, data, named, callbacks), spec, None), lambda *_: None, lambda _: ""
    )


# --- variants ----------------------------------------------------------------------------------


def test_a_trial_records_what_it_saw_and_cost() -> None:
    done = trial(costs=True)
    assert done.error is None
    assert (done.sites, done.parameters, done.steps, done.stopped) == (1, 57, 8, False)
    assert set(done.final) == {"val_loss", "val_accuracy"}
    assert set(done.test) == {"loss", "accuracy"}
    assert done.step_seconds is not None
    assert done.step_seconds > 0
    assert done.memory is not None
    assert done.memory > 2**26
    assert done.skew_before is not None
    assert done.skew_before > 0.1  # 8 steps of momentum 0.99
    assert done.skew_after == pytest.approx(0, abs=1e-5)
    assert (done.foldable, done.left) == (1, ())
    assert done.predict_seconds is not None
    assert done.predict_folded_seconds is not None
    assert len(done.start) == 16
    accuracy = done.history["val_accuracy"]
    assert done.best("val_accuracy", lower=False) == max(accuracy)
    assert done.epochs_to("val_accuracy", accuracy[1], lower=False) in (1, 2)
    assert done.epochs_to("val_accuracy", 1.01, lower=False) is None


def test_what_cannot_be_folded_says_why() -> None:
    done = trial("after_activation", costs=True)
    assert done.foldable == 1  # into the dense layer behind it
    done = trial(lambda m: m, make=subclassed, costs=True)
    assert done.foldable == 0
    assert "subclassed" in done.left[0]
    done = trial("none", costs=True)
    assert (done.sites, done.foldable, done.left) == (0, 0, ())
    assert done.predict_seconds is not None


class Own(keras.Model):
    """A model of the user's own, with a layer and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.out = keras.layers.BatchNormalization(), keras.layers.Dense(2)

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.out(self.bn(x, training=training))


def own_loss(true: Any, logits: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(true, logits, from_logits=True)


def subclassed() -> Any:
    model = Own()
    model.compile("sgd", own_loss, metrics=["accuracy"])
    return model


def test_all_variants_of_a_seed_start_from_the_same_weights() -> None:
    starts = {trial(v, epochs=1).start for v in (None, "after_activation", Variant(momentum=0.5))}
    assert len(starts) == 1
    assert trial(None, epochs=1, seed=4).start not in starts


def test_the_settings_of_a_variant_are_those_of_its_model() -> None:
    variant = Variant(
        lambda m: tn.replace(m, "truenorm").model,
        learning_rate=0.5,
        momentum=0.7,
        freeze="statistics",
    )
    model = variant.applied(build())
    layer = model.layers[1]
    assert isinstance(layer, tn.BatchNormalization)
    assert (layer.momentum, layer.freeze) == (0.7, "statistics")
    assert float(model.optimizer.learning_rate) == 0.5
    assert model.compiled
    assert trial(Variant(batch_size=4), epochs=1).final  # refused below where data cannot


def test_a_model_without_compilation_gets_that_of_the_first() -> None:
    done = trial(lambda m: keras.models.clone_model(m), epochs=1)
    assert set(done.final) == {"val_loss", "val_accuracy"}


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"one": None}, "A study compares two or more variants"),
        (("none", "none"), "A study compares two or more variants"),
        ({"a": None, "b": 3}, r"This is not a change of a model \(at 'change'\)"),
        ({"a": None, "\n": None}, "The name of a variant is not usable"),
    ],
)
def test_bad_variants(variants: Any, message: str) -> None:
    with pytest.raises(tn.OptionError, match=f"^{message}"):
        variants_of(variants)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"momentum": 1.5}, "momentum"),
        ({"freeze": "some"}, "freeze"),
    ],
)
def test_bad_settings_of_a_variant(options: dict[str, Any], where: str) -> None:
    with pytest.raises(tn.OptionError, match=rf"\(at '{where}'\)"):
        Variant(**options)


def test_a_function_that_returns_no_model() -> None:
    with pytest.raises(tn.ModelError, match=r"^The function of a variant did not return a model"):
        Variant(lambda m: None).applied(build())  # noqa: ARG005


# --- data --------------------------------------------------------------------------------------


def endless(seed: int) -> dict[str, Any]:
    def batches() -> Iterator[Any]:
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.integers(0, 48, 8)
            yield X[rows], Y[rows]

    validation = [(X[i : i + 8], Y[i : i + 8]) for i in (0, 8)]
    return {
        "train": batches(),
        "validation": Listed(validation),
        "steps_per_epoch": 3,
    }


class Listed(keras.utils.PyDataset):
    """Batches in a list, in the class that Keras has for them."""

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def test_an_endless_generator() -> None:
    done = trial(data=endless)
    assert done.steps == 6
    assert done.skew_after == pytest.approx(0, abs=1e-5)


def test_frameworks_own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of the backend in use: tf.data, or PyTorch's loader."""
    del monkeypatch
    if keras.config.backend() == "torch":
        import torch

        def made(seed: int) -> Any:
            pairs = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y).long())
            generator = torch.Generator().manual_seed(seed)
            loader = torch.utils.data.DataLoader(pairs, 8, shuffle=True, generator=generator)
            return loader, loader
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        def made(seed: int) -> Any:
            data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(48, seed).batch(8)
            return data, data
    else:

        def made(seed: int) -> Any:
            order = np.random.default_rng(seed).permutation(48)
            data = Listed([(X[order[i : i + 8]], Y[order[i : i + 8]]) for i in range(0, 48, 8)])
            return data, data

    first, second = trial(data=made), trial(data=made)
    assert first.steps == 12
    assert first.history == second.history  # the seed decides all
    assert first.skew_after == pytest.approx(0, abs=1e-5)


def test_a_batch_size_reaches_data_that_takes_it() -> None:
    def sized(seed: int, batch_size: int) -> Any:
        del seed
        batches = [(X[i : i + batch_size], Y[i : i + batch_size]) for i in range(0, 48, batch_size)]
        return Listed(batches), Listed(batches)

    assert trial(Variant(batch_size=12), data=sized, epochs=1).steps == 4


def test_data_that_gives_something_else() -> None:
    with pytest.raises(tn.DataError, match=r"^The data function did not give the parts"):
        trial(data=lambda seed: X)  # noqa: ARG005


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes"])
def test_ready_data_is_split_by_the_seed_with_equal_shares(name: str) -> None:
    pytest.importorskip("sklearn")
    one, again, other = (Ready(name)(seed) for seed in (0, 0, 1))
    sizes = [len(part[0]) for part in (one.train, one.validation, one.test)]
    assert [size / sum(sizes) for size in sizes] == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    np.testing.assert_array_equal(one.train[0], again.train[0])
    assert not np.array_equal(one.train[1], other.train[1])
    if name == "diabetes":
        assert one.train[1].dtype == "float32"
    else:
        shares = [np.bincount(part[1]) / len(part[1]) for part in (one.train, one.test)]
        np.testing.assert_allclose(*shares, atol=0.03)
    if name != "digits":
        np.testing.assert_allclose(one.train[0].mean(axis=0), 0, atol=1e-5)


def test_files_of_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    parts = Ready(str(tmp_path / "a.npz"))(0)
    assert [len(part[0]) for part in (parts.train, parts.validation, parts.test)] == [28, 10, 10]
    table = np.column_stack([X, Y])
    np.savetxt(tmp_path / "b.csv", table, delimiter=",", header="a,b,c,d,class", comments="")
    named = Ready(f"{tmp_path / 'b.csv'}:class")
    assert named(0).train[1].dtype == "int32"
    assert Ready(f"{tmp_path / 'b.csv'}:a")(0).train[1].dtype == "float32"
    before = named.identity()
    np.savetxt(tmp_path / "b.csv", table + 1, delimiter=",", header="a,b,c,d,class", comments="")
    assert named.identity() != before
    for name, message in (
        (f"{tmp_path / 'b.csv'}:e", "There is no such column"),
        (str(tmp_path / "none.npz"), "The data file cannot be read"),
        ("cheese", "There is no such data"),
        ("keras:cheese", "There is no such data in keras.datasets"),
    ):
        with pytest.raises(tn.DataError, match=f"^{message}"):
            Ready(name)(0)


def test_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = np.full((9, 7, 3), 100 * k + i, "uint8")
            image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    parts = Ready(str(tmp_path), image_size=(8, 8))(0)
    files, labels = parts.train
    assert files.shape == (12, 8, 8, 3)
    first = files[np.array([0, 5])]
    assert first.dtype == "float32"
    np.testing.assert_array_equal((first[:, 0, 0, 0] * 255 > 50).astype(int), labels[[0, 5]])
    assert sorted(np.bincount(parts.test[1])) == [2, 2]
    done = trial(make=build_of("cnn:4"), data=Ready(str(tmp_path), (8, 8)), epochs=1)
    assert done.skew_after == pytest.approx(0, abs=1e-4)
    for name in ("x", "y"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    with pytest.raises(tn.DataError, match=r"^This is no folder of images by class"):
        Ready(str(tmp_path / "empty"))(0)


def test_keras_datasets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in Keras's cache stands for the download."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    images = RNG.integers(0, 255, (50, 28, 28)).astype("uint8")
    labels = np.tile(np.arange(10), 5).astype("uint8")
    path = tmp_path / "datasets" / "mnist.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])

    def cached(*_: Any, **__: Any) -> str:
        return str(path)

    monkeypatch.setattr("keras.src.datasets.mnist.get_file", cached)
    parts = Ready("keras:mnist")(0)
    assert (parts.train[0].shape, parts.validation[0].shape) == ((40, 28, 28, 1), (10, 28, 28, 1))
    assert parts.test[0].shape == (10, 28, 28, 1)
    assert parts.train[0].max() <= 1


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp:8-4", (6,)), ("cnn:4-6", (8, 8, 1)), ("resnet:4", (8, 8, 3))]
)
def test_families_fit_the_data(name: str, shape: tuple[int, ...]) -> None:
    x = RNG.normal(size=(40, *shape)).astype("float32")

    def made(seed: int) -> Any:
        del seed
        return (x, np.arange(40) % 3), (x[:8], np.arange(8) % 3)

    done = trial(make=build_of(name), data=made, epochs=1)
    assert done.sites == {"mlp:8-4": 2, "cnn:4-6": 2, "resnet:4": 3}[name]
    done = trial(make=build_of(name), data=lambda seed: ((x, x[(..., *[0] * len(shape))]),) * 2,  # noqa: ARG005
                 epochs=1)  # fmt: skip
    assert "val_mae" in done.final


def test_a_file_gets_new_weights_with_each_seed(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    archive.save(build(), path)
    named = build_of(str(path))
    one, again, other = (trial(make=named, epochs=1, seed=s).start for s in (0, 0, 1))
    assert one == again != other


def test_applications_by_name() -> None:
    x = RNG.normal(size=(8, 32, 32, 3)).astype("float32")
    parts = Parts((x, np.arange(8) % 2), (x, np.arange(8) % 2))
    from truenorm._study.models import made

    model = made(build_of("applications:MobileNetV2"), lambda: parts, 0)
    assert model.output_shape == (None, 2)
    assert model.compiled


def test_functions_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_models.py").write_text("def build():\n    return 'it'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_of("my_models:build")() == "it"
    sys.modules.pop("my_models")


@pytest.mark.parametrize("name", ["cheese", "no.such:build", "mlp:a", "applications:Cheese", 3])
def test_models_that_there_are_not(name: Any) -> None:
    from truenorm._study.models import made

    with pytest.raises(tn.OptionError):
        made(build_of(name), lambda: Parts((X, Y), (X, Y)), 0)


# --- callbacks, and what ends badly ------------------------------------------------------------


def test_early_stopping_is_recorded() -> None:
    def callbacks() -> list[Any]:
        return [keras.callbacks.EarlyStopping("val_loss", min_delta=10.0, patience=1)]

    done = trial(callbacks=callbacks, epochs=5)
    assert done.stopped
    assert len(done.history["val_loss"]) == 2


def test_a_training_that_diverges_is_a_result() -> None:
    done = trial(Variant(learning_rate=1e30), epochs=2)
    assert done.error is None
    assert math.isnan(done.final["val_loss"]) or math.isinf(done.final["val_loss"])
    assert done.skew_before is None


def test_a_function_that_cannot_travel() -> None:
    import threading

    lock = threading.Lock()

    def locked() -> Any:
        with lock:
            return build()

    plan = Plan(locked, None, {"a": Variant(), "b": Variant()})
    with pytest.raises(tn.OptionError, match=r"^A function of this study cannot be sent"):
        plan.to_bytes()


def test_a_margin_of_zero() -> None:
    arrays = (X[:32], Y[:32]), (X[32:], Y[32:])
    with pytest.raises(tn.OptionError, match=r"^The margin is not a difference \(at 'margin'\)"):
        study(build, arrays, epochs=1, margin=0)
