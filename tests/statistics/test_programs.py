"""Models whose calls depend on shapes and values: what a compiled program sees gets home."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from small_models import snapshot

import truenorm as tn
from truenorm._kernels import reference

L = keras.layers
BACKEND = keras.config.backend()
GENERATOR = np.random.default_rng(7)
EPSILON = 1e-3


def drawn(*shape: int) -> np.ndarray:
    """Every step of a sequence has another mean and another deviation."""
    scale = 1 + np.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    return (GENERATOR.normal(1.0, 2.0, shape) * scale + 3 * scale).astype("float32")


def normalised(x: np.ndarray) -> np.ndarray:
    """By the statistics of its last axis over all others."""
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + EPSILON)


def check(population: tn.Population, path: str, values: np.ndarray) -> None:
    """The moments are those of these values, of shape (…, channels)."""
    rows = np.float64(values).reshape(-1, values.shape[-1])
    moments = population.sites[path]
    assert moments.count.tolist() == [len(rows)] * rows.shape[1]
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.variance, rows.var(0), rtol=1e-4)


def untouched(model: Any, data: Any, **options: Any) -> tn.Population:
    """Collects, and sees that the model is as it was and still works."""
    before, outputs = snapshot(model), model.predict(data, verbose=0)
    population = tn.collect(model, data, **options)
    assert snapshot(model)[:3] == before[:3]
    np.testing.assert_allclose(model.predict(data, verbose=0), outputs, rtol=1e-6)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(model(data, training=False)), outputs, rtol=1e-3, atol=1e-4
    )
    return population


# --- the same program again ----------------------------------------------------------------------


class Shift(keras.Layer):
    """Adds a number, or an array, that no variable holds."""

    by: Any = 1.0

    def call(self, x: Any) -> Any:
        return x + keras.ops.convert_to_tensor(self.by, x.dtype)


@pytest.mark.parametrize("to", [5.0, np.float32([1, 2]), lambda: keras.ops.ones((2,)) * 3])
def test_a_model_that_has_changed_is_seen_as_it_is(to: Any) -> None:
    data, shift = drawn(16, 2), Shift()
    model = keras.Sequential([keras.Input((2,)), shift, L.BatchNormalization(name="bn")])
    check(tn.collect(model, data), "bn", data + 1)
    for by in (to() if callable(to) else to, 7.0, np.float32([3, 4])):
        shift.by = by
        check(tn.collect(model, data), "bn", data + keras.ops.convert_to_numpy(by))


def test_models_with_one_program_have_each_its_names_and_numbers() -> None:
    data = drawn(16, 2)

    def found(name: str) -> tuple[Any, tn.Population]:
        dense = L.Dense(2)
        model = keras.Sequential([keras.Input((2,)), dense, L.BatchNormalization(name=name)])
        return keras.ops.convert_to_numpy(dense(data)), tn.collect(model, data)

    for name in ("one", "two", "one"):
        values, population = found(name)
        assert [*population.sites] == [name]
        check(population, name, values)


@pytest.mark.parametrize("behind", ["a", "b"])
def test_models_that_differ_in_what_they_leave_unused(behind: str) -> None:
    """Both have the same layers, and in both programs one kernel is multiplied by the data."""
    data, inputs = np.arange(32, dtype="float32").reshape(16, 2), keras.Input((2,))
    layers = {name: L.Dense(2, use_bias=False, name=name) for name in "ab"}
    ends = {name: layer(inputs) for name, layer in layers.items()}
    for name in ends:
        end = L.BatchNormalization(name="bn") if name == behind else L.ReLU(name="other")
        ends[name] = end(ends[name])
    model = keras.Model(inputs, L.Add()([*ends.values()]), name="same")
    for layer, factor in zip(layers.values(), (2.0, 3.0), strict=True):
        layer.set_weights([factor * np.eye(2)])
    check(tn.collect(model, data), "bn", data * (2 if behind == "a" else 3))


def test_a_program_is_not_compiled_twice() -> None:
    if BACKEND != "jax":
        pytest.skip("only JAX takes long over it")
    import jax

    compiled: list[str] = []

    def hear(event: str, _: float, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    model = keras.Sequential([keras.Input((2,)), L.Dense(3), L.BatchNormalization()])
    data = drawn(16, 2)
    first = tn.collect(model, data)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        again = tn.collect(model, data)
        assert compiled == []
        tn.collect(model, data[:8])
        assert compiled != []
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert again.to_dict() == first.to_dict()


def test_equal_layers_are_equal_code() -> None:
    """XLA compiles it once then: fifty such layers took 3 s, and 0.5 s where they are equal."""
    if BACKEND != "jax":
        pytest.skip("only JAX takes long over it")
    from truenorm._kernels.jax import sums

    def kinds(layers: int) -> set[str]:
        model = keras.Sequential([keras.Input((6, 6, 4))])
        for _ in range(layers):
            model.add(L.Conv2D(4, 3, padding="same"))
            model.add(L.BatchNormalization())
            model.add(L.ReLU())
        tn.collect(model, drawn(4, 6, 6, 4))
        text = next(reversed(sums._kept.values())).as_text()  # pyright: ignore
        for names in (r", metadata=\{[^}]*\}", r"%[\w.-]+", r"parameter\(\d+\)", r".*param_0.*"):
            text = re.sub(names, "", text)
        return {"".join(sorted(part.splitlines())) for part in text.split("\n\n")[1:-1]}

    assert len(kinds(9)) <= len(kinds(4))


# --- shapes --------------------------------------------------------------------------------------


class BySize(keras.Model):
    """Another layer for small batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = L.BatchNormalization(name="a"), L.BatchNormalization(name="b")

    def call(self, x: Any, training: bool | None = None) -> Any:
        return (self.a if x.shape[0] == 8 else self.b)(x, training=training)


def test_batches_of_each_size_are_credited_to_the_layer_that_saw_them() -> None:
    model = BySize()
    for layer in (model.a, model.b):
        layer.build((None, 1))
    model.built = True
    data = [np.full((8, 1), v, "float32") if v > 0 else np.full((4, 1), v, "float32")
            for v in (1, -10, 3, -12)]  # fmt: skip
    done = tn.recalibrate(model, data)
    means = [float(keras.ops.convert_to_numpy(k.moving_mean)[0]) for k in (model.a, model.b)]
    assert means == [2.0, -11.0]
    assert [m.count.tolist() for m in done.population.sites.values()] == [[16.0], [8.0]]
    (variance,) = done.population.sites["a"].variance
    assert variance == pytest.approx(1.0)


def test_sequences_of_any_length_are_seen_step_by_step() -> None:
    inputs = keras.Input((None, 2))
    x = L.TimeDistributed(L.BatchNormalization(name="bn"), name="each")(inputs)
    model = keras.Model(inputs, L.BatchNormalization(name="after")(x))
    data = [drawn(4, length, 2) for length in (5, 7, 9, 11)]
    population = tn.collect(model, data)
    check(population, "each/bn", np.concatenate([x.reshape(-1, 2) for x in data]))
    each = [np.stack([normalised(x[:, t]) for t in range(x.shape[1])], 1) for x in data]
    check(population, "after", np.concatenate([x.reshape(-1, 2) for x in each]))
    assert population.sites["each/bn"].count[0] == 128


class Force(L.Layer):
    """The gradient of an energy with a BatchNormalization in it, as of a potential."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bn = L.BatchNormalization(name="bn")

    def build(self, shape: Any) -> None:
        self.bn.build(shape)
        self.built = True

    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def energy(self, x: Any, training: Any) -> Any:
        return keras.ops.sum(self.bn(x, training=training) ** 3) / 3

    def call(self, x: Any, training: bool = False) -> Any:
        if BACKEND == "jax":
            import jax

            return jax.grad(self.energy)(x, training)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch(x)
                energy = self.energy(x, training)
            return tape.gradient(energy, x)
        import torch

        with torch.enable_grad():
            at = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(at, training), at)[0]


class Potential(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.force, self.after = Force(name="force"), L.BatchNormalization(name="after")

    def call(self, x: Any, training: bool = False) -> Any:
        return self.after(self.force(x, training=training), training=training)


def test_a_model_that_differentiates_in_its_call_does_so_through_the_statistics() -> None:
    data = [drawn(16, 3), drawn(12, 3)]
    model = Potential()
    model(data[0])
    population = tn.collect(model, data)
    check(population, "force/bn", np.concatenate(data))
    forces = [reference.backward(normalised(np.float64(x)) ** 2, x).x for x in data]
    check(population, "after", np.concatenate(forces))


# --- inside of what is compiled ------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="programs")
class Cell(L.Layer):
    """Adds up the normalised steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state_size = self.output_size = 2
        self.bn = L.BatchNormalization(name="bn")

    def build(self, shape: Any) -> None:
        self.bn.build(shape)
        self.built = True

    def call(self, x: Any, states: Any, training: bool | None = None) -> Any:
        total = states[0] + self.bn(x, training=training)
        return total, [total]


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_a_cell_of_an_rnn(unroll: bool, upstream: Any) -> None:
    inputs = keras.Input((6, 2))
    x = L.BatchNormalization(name="first")(inputs)
    x = L.RNN(Cell(name="cell"), return_sequences=True, unroll=unroll, name="rnn")(x)
    model = keras.Model(inputs, L.BatchNormalization(name="last")(x))
    data = drawn(16, 6, 2)
    population = untouched(model, data, upstream=upstream, batch_size=16)
    check(population, "first", data)
    before = normalised(data)
    check(population, "rnn/cell/bn", before)
    alone = upstream == "batch"  # each step with statistics of its own
    steps = [normalised(before[:, t]) for t in range(6)] if alone else [normalised(before)]
    sums = np.cumsum(np.stack(steps, 1) if alone else steps[0], axis=1)
    check(population, "last", sums)
    assert list(population.sites) == ["first", "rnn/cell/bn", "last"]


def test_a_cell_in_both_directions() -> None:
    inputs = keras.Input((5, 2))
    both = L.Bidirectional(L.RNN(Cell(name="cell"), return_sequences=True, name="rnn"), name="both")
    model = keras.Model(inputs, both(inputs))
    data = drawn(8, 5, 2)
    population = untouched(model, data, batch_size=8)
    assert len(population.sites) == 2
    for path in population.sites:
        check(population, path, data)


class Inside(L.Layer):
    """Calls its BatchNormalization in a way of its own."""

    def __init__(self, how: Callable[[Any, Any], Any]) -> None:
        super().__init__(name="inside")
        self.how = how
        self.bn, self.other = L.BatchNormalization(name="bn"), L.BatchNormalization(name="other")

    def build(self, shape: Any) -> None:
        for layer in (self.bn, self.other):
            layer.build((None, shape[-1]))
        self.built = True

    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def get_config(self) -> dict[str, Any]:
        return {}

    def call(self, x: Any) -> Any:
        return self.how(self, x)


def with_inside(how: Callable[[Any, Any], Any], *shape: int) -> Any:
    inputs = keras.Input(shape)
    x = Inside(how)(L.BatchNormalization(name="first")(inputs))
    return keras.Model(inputs, L.BatchNormalization(name="last")(x))


def recomputed(layer: Any, x: Any) -> Any:
    return keras.remat(lambda y: layer.bn(y))(x)


def test_a_recomputed_part() -> None:
    model = with_inside(recomputed, 2)
    data = drawn(32, 2)
    population = untouched(model, data, batch_size=32)
    check(population, "inside/bn", normalised(data))
    check(population, "last", normalised(normalised(data)))
    assert "inside/other" not in population.sites


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras has no such models on JAX")
def test_a_part_that_the_user_has_compiled() -> None:
    import tensorflow as tf

    class Apart(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = (L.BatchNormalization(name=n) for n in ("first", "last"))
            self.start = tf.function(lambda x: self.first(x))

        @tf.function
        def call(self, x: Any) -> Any:
            if tf.reduce_sum(x) > 0:  # only a function that is compiled takes such a condition
                x = x + 1.0
            return self.last(self.start(x))

    model, data = Apart(), drawn(32, 2)
    model(data)
    population = untouched(model, data, batch_size=32)
    check(population, "first", data + 1)
    check(population, "last", normalised(data + 1))


def chosen(layer: Any, x: Any) -> Any:
    positive = keras.ops.mean(x[:, 0]) > 0
    return keras.ops.cond(positive, lambda: layer.bn(x), lambda: layer.other(x))


def test_a_condition_on_values() -> None:
    inputs = keras.Input((2,))
    model = keras.Model(inputs, L.BatchNormalization(name="last")(Inside(chosen)(inputs)))
    data = [GENERATOR.normal(m, 1.0, (16, 2)).astype("float32") for m in (5, -5, 7, -7, 6)]
    population = tn.collect(model, data)
    check(population, "inside/bn", np.concatenate([data[i] for i in (0, 2, 4)]))
    check(population, "inside/other", np.concatenate([data[i] for i in (1, 3)]))
    check(population, "last", np.concatenate([normalised(x) for x in data]))
    assert list(population.sites) == ["inside/bn", "inside/other", "last"]
    calls = tn.diagnose(model, data, select="TN307")
    assert calls.checked == ("TN307",)


def mapped(layer: Any, x: Any) -> Any:
    steps = keras.ops.swapaxes(x, 0, 1)
    return keras.ops.swapaxes(keras.ops.vectorized_map(lambda y: layer.bn(y), steps), 0, 1)


def test_a_vectorised_map_is_seen_through_or_refused() -> None:
    model = with_inside(mapped, 5, 2)
    data = drawn(16, 5, 2)
    if BACKEND == "jax":
        population = untouched(model, data, batch_size=16)
        steps = normalised(data)
        check(population, "inside/bn", steps)
        check(population, "last", np.stack([normalised(steps[:, t]) for t in range(5)], 1))
        return
    before = snapshot(model)
    with pytest.raises(tn.ModelError) as caught:
        tn.recalibrate(model, data)
    assert str(caught.value) == (
        "What this BatchNormalization sees cannot be told from where it is called (at "
        "'inside/bn'). Expected: a call in a loop, condition or function that the framework can "
        "look out of. Received: a vectorised map. Remedy: make it a Python loop (unroll=True for "
        "an RNN), without vectorized_map or jit_compile."
    )
    assert snapshot(model)[:3] == before[:3]
    assert model.predict(data, verbose=0).shape == (16, 5, 2)


def test_what_cannot_be_told_is_refused_with_the_frameworks_reason() -> None:
    """A condition inside a vectorised map; a part that XLA compiles by itself."""

    def both_branches(layer: Any, x: Any) -> Any:
        def one(y: Any) -> Any:
            return keras.ops.cond(y[0] > 0, lambda: layer.bn(y[None])[0], lambda: y)

        return keras.ops.vectorized_map(one, x)

    def compiled_apart(layer: Any, x: Any) -> Any:
        import tensorflow as tf

        return tf.function(lambda y: layer.bn(y), jit_compile=True)(x)

    if BACKEND == "torch":
        pytest.skip("PyTorch runs what it comes by")
    model = with_inside(compiled_apart if BACKEND == "tensorflow" else both_branches, 2)
    data = drawn(16, 2)
    with pytest.raises(tn.ModelError, match=r"^What this BatchNormalization sees cannot be told"):
        tn.collect(model, data)
    assert model.predict(data, verbose=0).shape == (16, 2)
