"""collect and recalibrate against a float64 computation in one shot, written here by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
from small_models import (
    dense,
    inputs_for,
    nested,
    residual,
    shake,
    snapshot,
    subclassed,
    two_towers,
)

import truenorm as tn
import truenorm._statistics.recalibrate
from truenorm._model.graph import layer_paths


def stack(kind: str = "keras") -> Any:
    """Two dense layers, each with BatchNormalization: small enough to compute by hand."""
    make = {"keras": keras.layers.BatchNormalization, "truenorm": tn.BatchNormalization}[kind]
    return shake(
        keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(5, name="d1"),
                make(name="bn1"),
                keras.layers.ReLU(),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(3, name="d2"),
                make(name="bn2"),
            ]
        )
    )


def weights(layer: Any) -> list[np.ndarray]:
    return [np.float64(keras.ops.convert_to_numpy(w)) for w in layer.weights]


def by_hand(model: Any, x: np.ndarray, size: int, upstream: str) -> dict[str, np.ndarray]:
    """Inputs of both BatchNormalization layers over the whole of x, in float64."""
    (w1, b1), (w2, b2) = (weights(model.get_layer(n)) for n in ("d1", "d2"))
    gamma, beta, moving_mean, moving_variance = weights(model.get_layer("bn1"))
    first = np.float64(x) @ w1 + b1
    second = []
    for start in range(0, len(x), size):
        part = first[start : start + size]
        source = {"batch": part, "population": first}.get(upstream)
        mean = moving_mean if source is None else source.mean(0)
        variance = moving_variance if source is None else source.var(0)
        y = (part - mean) / np.sqrt(variance + model.get_layer("bn1").epsilon) * gamma + beta
        second.append(np.maximum(y, 0) @ w2 + b2)
    return {"bn1": first, "bn2": np.concatenate(second)}


@pytest.mark.parametrize("kind", ["keras", "truenorm"])
@pytest.mark.parametrize("upstream", ["batch", "population", "moving"])
@pytest.mark.parametrize("size", [8, 30, 100])
def test_the_population_is_that_of_the_whole_set(kind: str, upstream: Any, size: int) -> None:
    model = stack(kind)
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(100, 4)).astype("float32")
    before = snapshot(model)
    population = tn.collect(model, (x, np.zeros(100)), upstream=upstream, batch_size=size)
    assert snapshot(model) == before
    assert (population.samples, population.batches) == (100, -(-100 // size))
    # Two layers: never more passes than that and two, and no second one of a single batch's sample.
    assert population.passes in ({2, 3, 4} if upstream == "population" else {1})
    for path, values in by_hand(model, x, size, upstream).items():
        moments = population.sites[path]
        assert moments.count.tolist() == [100.0] * values.shape[1]
        deviation = values.std(0)
        np.testing.assert_allclose((moments.mean - values.mean(0)) / deviation, 0, atol=2e-6)
        np.testing.assert_allclose(moments.variance, values.var(0), rtol=1e-5)


def test_parts_collected_apart_and_merged_are_one() -> None:
    model = stack()
    x = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
    whole = tn.collect(model, x, batch_size=16)
    halves = tn.collect(model, x[:32], batch_size=16).merge(
        tn.collect(model, x[32:], batch_size=16)
    )
    assert (halves.samples, halves.batches) == (96, 6)
    for path, moments in whole.sites.items():
        np.testing.assert_allclose(halves.sites[path].mean, moments.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(halves.sites[path].m2, moments.m2, rtol=1e-12)


@pytest.mark.parametrize("build", [dense, residual, nested, two_towers, subclassed])
def test_every_kind_of_model_is_collected(build: Callable[[], Any]) -> None:
    model = shake(build())
    x = np.ones((6, 3), "float32") if build is subclassed else inputs_for(model, 6)
    population = tn.collect(model, x)
    layers = [
        path
        for layer, path in layer_paths(model).items()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert list(population.sites) == layers


def test_a_shared_layer_has_the_moments_of_all_its_calls() -> None:
    model = two_towers()
    x = inputs_for(model, 6)
    conv = model.get_layer("conv")
    values = np.concatenate([keras.ops.convert_to_numpy(conv(x[k])) for k in ("left", "right")])
    moments = tn.collect(model, x).sites["bn"]
    assert moments.count[0] == values.size / 4
    np.testing.assert_allclose(moments.mean, values.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.variance, values.var((0, 1, 2)), rtol=1e-4)


def test_masked_steps_do_not_count() -> None:
    model = keras.Sequential(
        [keras.Input((5, 2)), keras.layers.Masking(), keras.layers.BatchNormalization(name="bn")]
    )
    x = np.random.default_rng(0).normal(size=(4, 5, 2)).astype("float32")
    x[:, 3:] = 0
    moments = tn.collect(model, x).sites["bn"]
    np.testing.assert_allclose(moments.count, 12)
    np.testing.assert_allclose(moments.variance, x[:, :3].var((0, 1)), rtol=1e-5)


class Batches(keras.utils.PyDataset):
    def __init__(self, x: np.ndarray) -> None:
        super().__init__()
        self.x = x

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.x[index * 4 : index * 4 + 4], np.zeros(4)


def forms_of(x: np.ndarray) -> dict[str, Any]:
    return {
        "array": x,
        "x, y": (x, np.zeros(20)),
        "PyDataset": Batches(x),
        "list": [x[i : i + 4] for i in range(0, 20, 4)],
        "generator": ((x[i : i + 4], 0) for i in range(0, 20, 4)),
    }


@pytest.mark.parametrize("form", forms_of(np.zeros((20, 4))))
def test_data_in_every_form_gives_the_same(form: str) -> None:
    model = stack()
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    expected = tn.collect(model, x, batch_size=4)
    found = tn.collect(model, forms_of(x)[form], batch_size=4)
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize("build", [stack, residual, nested])
def test_after_recalibration_inference_sees_what_the_layers_hold(build: Callable[[], Any]) -> None:
    model = shake(build())
    x = inputs_for(model, 40)
    done = tn.recalibrate(model, x, upstream="population")
    seen = tn.collect(model, x, upstream="moving")
    for path, moments in seen.sites.items():
        deviation = done.population.sites[path].standard_deviation
        shift = (moments.mean - done.population.sites[path].mean) / deviation
        np.testing.assert_allclose(shift, 0, atol=1e-5)
        np.testing.assert_allclose(
            moments.variance, done.population.sites[path].variance, rtol=1e-4
        )


def test_recalibration_changes_the_statistics_only_and_can_be_undone() -> None:
    model = stack()
    before = {w.path: w.numpy().copy() for w in model.weights}
    bits = snapshot(model)
    done = tn.recalibrate(model, np.ones((9, 4), "float32") * np.arange(4, dtype="float32"))
    changed = {w.path for w in model.weights if not np.array_equal(w.numpy(), before[w.path])}
    assert {path.split("/", 1)[1] for path in changed} == {
        f"bn{i}/{name}" for i in (1, 2) for name in ("moving_mean", "moving_variance")
    }
    assert [gap.path for gap in done.before] == ["bn1", "bn2"]
    done.undo()
    assert snapshot(model) == bits


def test_of_a_population_only_the_layers_that_are_meant_are_written() -> None:
    model = stack()
    population = tn.collect(model, np.random.default_rng(0).normal(size=(9, 4)))
    first, *others = [layer for layer in model.layers if hasattr(layer, "moving_mean")]
    before = [weights(layer) for layer in others]
    done = tn.recalibrate(model, population, layers=first.name)
    assert [gap.path for gap in done.before] == [*done.population.standard_errors()] == [first.name]
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(first.moving_mean), population.sites[first.name].mean, rtol=1e-6
    )
    for layer, values in zip(others, before, strict=True):
        for now, old in zip(weights(layer), values, strict=True):
            np.testing.assert_array_equal(now, old)
    with pytest.raises(tn.OptionError, match=r"^No BatchNormalization of the model is"):
        tn.recalibrate(model, population, layers="other")


def test_a_population_that_lacks_the_layers_that_are_meant_is_refused() -> None:
    model = stack()
    first, second, *_ = [layer.name for layer in model.layers if hasattr(layer, "moving_mean")]
    population = tn.collect(model, np.ones((9, 4), "float32"), layers=first)
    message = (
        rf"^The population has none of the layers that are meant \(at 'layers'\)\. Expected: some "
        rf"of \['{first}'\]\. Received: \['{second}'\]\. Remedy: collect it without layers, or "
        r"with these\.$"
    )
    with pytest.raises(tn.DataError, match=message):
        tn.recalibrate(model, population, layers=second)


def test_renorm_statistics_are_all_written() -> None:
    layer = keras.layers.BatchNormalization(renorm=True, name="bn")
    model = keras.Sequential([keras.Input((2,)), layer])
    x = np.array([[0.0, 1.0], [4.0, 5.0]], "float32")
    tn.recalibrate(model, x)
    deviation = np.sqrt(4 + layer.epsilon)
    for name, expected in {
        "moving_mean": [2, 3],
        "moving_variance": [4, 4],
        "moving_stddev": [deviation] * 2,
        "renorm_mean": [2, 3],
        "renorm_stddev": [deviation] * 2,
    }.items():
        found = keras.ops.convert_to_numpy(getattr(layer, name))
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)


def test_the_gap_is_in_standard_deviations_and_doublings() -> None:
    layer = keras.layers.BatchNormalization(epsilon=0.0, name="bn")
    model = keras.Sequential([keras.Input((1,)), layer])
    layer.moving_mean.assign([10.0])
    layer.moving_variance.assign([16.0])
    gap = tn.recalibrate(model, np.array([[0.0], [4.0]], "float32")).before[0]
    assert gap.mean == pytest.approx((10 - 2) / 2)
    assert gap.scale == pytest.approx(1.0)  # 16 against 4: the scale is a factor of two off


# --- bad data ----------------------------------------------------------------------------------


def endless() -> Iterator[np.ndarray]:
    yield from ()


@pytest.mark.parametrize("data", [np.zeros((0, 4), "float32"), [], endless()])
def test_no_data_is_refused(data: Any) -> None:
    model = stack()
    before = snapshot(model)
    with pytest.raises(tn.DataError, match=r"^There is no data to take statistics of"):
        tn.recalibrate(model, data)
    assert snapshot(model) == before


def test_data_of_another_shape_is_refused() -> None:
    with pytest.raises(tn.DataError, match=r"Expected: shapes \[\(None, 4\)\]. Received: \[\(2, 7"):
        tn.collect(stack(), np.zeros((2, 7), "float32"))
    with pytest.raises(tn.DataError, match="cannot be read in batches"):
        tn.collect(stack(), 3)


def test_not_a_number_is_refused_and_nothing_is_written() -> None:
    model = stack()
    before, x = snapshot(model), np.zeros((8, 4), "float32")
    x[3, 1] = np.nan
    with pytest.raises(tn.DataError, match=r"not finite numbers; nothing was written \(at 'bn1'\)"):
        tn.recalibrate(model, x)
    assert snapshot(model) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_data_that_breaks_off_leaves_the_model_as_it_was(stop: type[BaseException]) -> None:
    model = stack()
    before = snapshot(model)

    def breaking() -> Iterator[np.ndarray]:
        yield np.ones((4, 4), "float32")
        raise stop

    with pytest.raises(stop):
        tn.recalibrate(model, breaking())
    assert snapshot(model) == before


def test_populations_of_other_models_do_not_merge() -> None:
    x = np.ones((4, 4), "float32")
    a, b = tn.collect(stack(), x), tn.collect(stack(), x, upstream="moving")
    with pytest.raises(tn.DataError, match="can be merged only if they are of the same model"):
        a.merge(b)
    with pytest.raises(tn.OptionError, match=r"Received: 'both'\.$"):
        tn.collect(stack(), x, upstream="both")  # pyright: ignore[reportArgumentType]


# --- corners -----------------------------------------------------------------------------------


def test_layers_of_the_same_name_get_their_own_statistics() -> None:
    class Twins(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [
                keras.Sequential([keras.layers.BatchNormalization(name="bn")], name="block")
                for _ in range(2)
            ]

        def call(self, x: Any) -> Any:
            return self.blocks[1](self.blocks[0](x) * 3.0 + 1.0)

    model = Twins()
    x = np.random.default_rng(0).normal(5.0, 2.0, size=(64, 2)).astype("float32")
    model(x)
    tn.recalibrate(model, x, batch_size=64)
    first, second = (b.layers[-1].moving_mean.numpy() for b in model.blocks)
    np.testing.assert_allclose(first, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(second, [1.0, 1.0], rtol=1e-4)


def test_the_data_is_not_cast_to_a_global_policy() -> None:
    """Values that float16 cannot hold, in a layer that is float32."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential(
            [keras.Input((1,)), keras.layers.BatchNormalization(dtype="float32", name="bn")]
        )
        x = 2000 + np.arange(4, dtype="float32")[:, None] / 8
        moments = tn.collect(model, x).sites["bn"]
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(moments.variance, x.var(), rtol=1e-4)


def test_a_layer_out_of_sight_is_settled_too() -> None:
    inputs = keras.Input((4, 3))
    x = keras.layers.TimeDistributed(keras.layers.BatchNormalization(name="in"), name="t")(inputs)
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="bn")(x))
    data = np.random.default_rng(0).normal(size=(8, 4, 3)).astype("float32")
    population = tn.collect(model, data, upstream="population", batch_size=4)
    assert list(population.sites) == ["t/in", "bn"]
    assert population.agreement is not None
    assert population.agreement < 2e-6


def test_an_interrupted_writing_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    before = snapshot(model)
    written: list[Any] = []
    assign = keras.Variable.assign

    def interrupted(self: Any, value: Any) -> Any:
        written.append(self)
        if len(written) == 3:
            raise KeyboardInterrupt
        return assign(self, value)

    def measured(*_: Any) -> Any:  # the last step before the writing
        monkeypatch.setattr(keras.Variable, "assign", interrupted)
        return ()

    monkeypatch.setattr(truenorm._statistics.recalibrate, "gaps", measured)
    with pytest.raises(KeyboardInterrupt):
        tn.recalibrate(model, np.random.default_rng(0).normal(size=(8, 4)).astype("float32"))
    monkeypatch.undo()
    assert len(written) > 3  # some were written, and put back
    assert snapshot(model) == before


def test_one_value_has_no_variance_to_give() -> None:
    model = stack()
    variance = model.get_layer("bn1").moving_variance.numpy().copy()
    tn.recalibrate(model, np.ones((1, 4), "float32"))
    np.testing.assert_array_equal(model.get_layer("bn1").moving_variance.numpy(), variance)


def test_what_a_variable_cannot_hold_is_refused() -> None:
    layer = keras.layers.BatchNormalization(dtype="float16", name="bn")
    model = keras.Sequential([keras.Input((1,), dtype="float32"), layer])
    before = snapshot(model)
    x = np.array([[-1000.0], [1000.0]], "float32")  # a variance of 1e6; float16 ends at 65504
    with pytest.raises(tn.DataError, match="not finite numbers; nothing was written"):
        tn.recalibrate(model, x)
    assert snapshot(model) == before


@pytest.mark.skipif(keras.config.backend() == "jax", reason="its arrays are float32 here")
def test_numbers_of_a_float64_model_stay_float64() -> None:
    """Their squares are beyond float32."""
    before = keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        first, dense = tn.BatchNormalization(), keras.layers.Dense(3)
        last = keras.layers.BatchNormalization(name="last")
        model = keras.Sequential([keras.Input((4,)), first, dense, last])
        x = np.random.default_rng(0).normal(size=(64, 4)) * 1e21
        found = tn.collect(model, x, batch_size=64).sites["last"]
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(before)
    kernel, bias = weights(dense)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) @ kernel + bias
    np.testing.assert_allclose(found.variance, expected.var(0), rtol=1e-7)
