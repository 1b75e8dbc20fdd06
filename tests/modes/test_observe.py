"""observe: what is seen, for any model and any way to run it, and that nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from small_models import LAYERS, inputs_for, nested, residual, snapshot, two_towers

import truenorm as tn
from truenorm._model.graph import layer_paths


class Own(keras.Model):
    """Subclassed: one BatchNormalization called twice, one in a sub-model, one in a wrapper."""

    def __init__(self, kind: str = "keras") -> None:
        super().__init__(name="own")
        self.twice = LAYERS[kind](name="twice")
        self.inner = keras.Sequential(
            [keras.layers.Dense(3), LAYERS[kind](name="bn")], name="inner"
        )
        self.steps = keras.layers.TimeDistributed(LAYERS[kind](name="step"), name="steps")
        self.head = keras.layers.Dense(1)

    def call(self, x: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        x = self.steps(keras.ops.expand_dims(self.inner(x), 1))
        x = self.twice(self.twice(x[:, 0]), training=False)
        return self.head(x)


@pytest.fixture(scope="module", params=LAYERS)
def fitted(request: pytest.FixtureRequest) -> Any:
    """A compiled model whose functions are cached."""
    model = residual(request.param)
    model.compile("sgd", "mse")
    x = inputs_for(model)
    model.fit(x, np.zeros((8, 3)), verbose=0)
    model.predict(x, verbose=0)
    return model


def calls_of(mode: Any) -> list[str]:
    return [calls.describe() for calls in mode.calls]


def test_every_call_of_fit_and_predict_is_seen_although_they_were_compiled(fitted: Any) -> None:
    x, y = inputs_for(fitted), np.zeros((8, 3))
    functions = snapshot(fitted)[4]
    with tn.observe(fitted) as seen:
        fitted.fit(x, y, batch_size=3, epochs=2, validation_data=(x, y), validation_batch_size=8,
                   verbose=0)  # fmt: skip
        fitted.predict(x, batch_size=4, verbose=0)
    assert snapshot(fitted)[4] == functions
    assert list(seen.modes) == ["stem_bn", "a_bn", "b_bn", "c_bn"]
    for mode in seen.modes.values():
        assert calls_of(mode) == ["6× training=True: batch", "4× training=False: moving"]
        assert mode.updated
        assert mode.learned
        assert mode.statistics == "mixed"


def test_calls_and_flags_changed_in_between_are_told_apart(fitted: Any) -> None:
    x = inputs_for(fitted)
    with tn.observe(fitted) as seen:
        fitted(x, training=True)
        undo = tn.freeze(fitted, layers="a_bn").undo
        fitted(x, training=True)
        undo()
        fitted(x)
    assert calls_of(seen.modes["a_bn"]) == [
        "1× training=True: batch",
        "1× training=True, frozen: all: moving",
        "1× training=None: moving",
    ]
    assert seen.modes["a_bn"].updated
    assert not seen.modes["a_bn"].learned


@pytest.mark.parametrize("kind", LAYERS)
def test_a_subclassed_model_is_seen_at_any_nesting(kind: str) -> None:
    model = Own(kind)
    x = np.random.default_rng(0).normal(size=(4, 2)).astype("float32")
    model(x)
    with tn.observe(model) as seen:
        model(x, training=True)
    assert {path: calls_of(mode) for path, mode in seen.modes.items()} == {
        "twice": ["1× training=True: batch", "1× training=False: moving"],
        "inner/bn": ["1× training=True: batch"],
        "steps/step": ["1× training=True: batch"],
    }


def test_keras_hands_a_training_flag_on_to_the_layers_called_afterwards() -> None:
    """In 3.15.1 one ``training=False`` stills all that follow."""

    class Leaking(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="leaking")
            self.first, self.second = (
                keras.layers.BatchNormalization(name=name) for name in ("first", "second")
            )

        def call(self, x: Any, training: bool | None = None) -> Any:  # noqa: ARG002
            return self.second(self.first(x, training=False))

    model = Leaking()
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    model(x)
    with tn.observe(model) as seen:
        model(x, training=True)
    assert calls_of(seen.modes["second"]) == ["1× training=False: moving"]
    surprises = {one.path: one for one in tn.inspect(model, x).surprises}
    # JAX's fit hands nothing on at all: what a call does not pass on itself is lost.
    lost = keras.backend.backend() == "jax"
    expected = "call_without_training" if lost else "inference_mode_in_fit"
    assert surprises["second"].code == expected


def test_the_calls_of_a_shared_layer_are_told_apart() -> None:
    inputs = keras.Input((4,))
    layer = keras.layers.BatchNormalization(name="bn")
    model = keras.Model(inputs, layer(layer(inputs), training=False))
    with tn.observe(model) as seen:
        model(inputs_for(model))
        model(inputs_for(model))
    assert {path: calls_of(mode) for path, mode in seen.modes.items()} == {
        "bn": ["2× training=None: moving"],
        "bn#2": ["2× training=False: moving"],
    }
    towers = two_towers()
    with tn.observe(towers) as seen:
        towers.predict(inputs_for(towers), verbose=0)
    assert [calls_of(mode) for mode in seen.modes.values()] == [["1× training=False: moving"]] * 2


def test_an_own_training_loop_is_seen() -> None:
    model = residual("truenorm")
    model.compile("sgd", "mse")
    with tn.observe(model) as seen:
        model.train_on_batch(inputs_for(model), np.ones((8, 3)))
        model.test_on_batch(inputs_for(model), np.ones((8, 3)))
    expected = ["1× training=True: batch", "1× training=False: moving"]
    assert [calls_of(mode) for mode in seen.modes.values()] == [expected] * 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interruption_inside_leaves_nothing_behind(fitted: Any, error: type[Exception]) -> None:
    before = snapshot(fitted)
    eagerly = fitted.run_eagerly, fitted.jit_compile
    with pytest.raises(error), tn.observe(fitted) as seen:  # noqa: PT012
        fitted(inputs_for(fitted))
        raise error
    assert snapshot(fitted) == before
    assert (fitted.run_eagerly, fitted.jit_compile) == eagerly
    assert calls_of(seen.modes["a_bn"]) == ["1× training=None: moving"]


def test_an_interruption_inside_a_call_leaves_nothing_behind(
    fitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(fitted.get_layer("b_bn")), "call", interrupted)
    before = snapshot(fitted)
    with pytest.raises(KeyboardInterrupt), tn.observe(fitted) as seen:
        fitted(inputs_for(fitted))
    assert snapshot(fitted) == before
    assert [len(mode.calls) for mode in seen.modes.values()] == [1, 1, 0, 0]


def test_a_change_after_compile_is_noted(fitted: Any) -> None:
    """Trap 11."""
    fitted.get_layer("a_bn").trainable = False
    try:
        with tn.observe(fitted) as seen:
            pass
    finally:
        fitted.get_layer("a_bn").trainable = True
    (note,) = seen.notes
    assert note.startswith("trainable of 'a_bn' was changed after the model was compiled.")


@pytest.mark.parametrize("build", [residual, nested])
def test_it_prints_alike_sites_together_and_goes_to_json(build: Callable[[], Any]) -> None:
    model = build()
    with tn.observe(model) as seen:
        model(inputs_for(model))
    count = sum(isinstance(one, keras.layers.BatchNormalization) for one in layer_paths(model))
    assert f"{count} sites: " in str(seen)
    assert "1× training=None: moving" in str(seen)
    first = next(iter(seen.to_dict()["modes"].values()))
    assert first["calls"] == [
        {"training": None, "trainable": True, "policy": "none", "statistics": "moving", "times": 1}
    ]


# --- trap 16: how often the statistics move -----------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_a_shared_layer_takes_one_step_per_call_and_is_seen_to(kind: str) -> None:
    inputs = keras.Input((3,))
    layer = LAYERS[kind](momentum=0.5, name="bn")
    model = keras.Model(inputs, layer(layer(inputs)))
    x = np.random.default_rng(0).normal(4.0, 2.0, size=(64, 3)).astype("float32")
    with tn.observe(model) as seen:
        model(x, training=True)
    assert {path: calls_of(mode) for path, mode in seen.modes.items()} == {
        "bn": ["1× training=True: batch"],
        "bn#2": ["1× training=True: batch"],
    }
    moving = keras.ops.convert_to_numpy(layer.moving_mean)
    np.testing.assert_allclose(moving, x.mean(axis=0) / 4, rtol=1e-4, atol=1e-6)  # 0 follows


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_accumulate_but_statistics_move_with_every_micro_batch(kind: str) -> None:
    """And weights of samples do not count in them."""
    layer = LAYERS[kind](momentum=0.5, name="bn")
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(4.0, 2.0, size=(30, 3)).astype("float32")
    ignored = np.repeat([0.0, 1.0], 15)
    with tn.observe(model) as seen:
        model.fit(x, x[:, 0], sample_weight=ignored, batch_size=10, shuffle=False, verbose=0)
    mode = seen.modes["bn"]
    assert calls_of(mode) == ["3× training=True: batch"]
    assert (mode.updated, mode.learned) == (True, False)
    means = x.reshape(3, 10, 3).mean(axis=1)
    expected = means[0] / 8 + means[1] / 4 + means[2] / 2
    moving = keras.ops.convert_to_numpy(layer.moving_mean)
    np.testing.assert_allclose(moving, expected, rtol=1e-4)


@pytest.mark.parametrize("change", ["freeze", "compile"])
def test_what_is_changed_inside_holds_afterwards(change: str) -> None:
    layer = LAYERS["truenorm"](name="bn")
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = inputs_for(model), np.ones((8, 1))
    model.fit(x, y, verbose=0)
    with tn.observe(model) as seen:
        if change == "freeze":
            tn.freeze(model, "statistics")
        else:
            model.compile(keras.optimizers.SGD(name="second"), "mse", run_eagerly=False)
        model.fit(x, y, verbose=0)
    assert seen.modes["bn"].statistics == ("moving" if change == "freeze" else "batch")
    assert not model.run_eagerly
    before, steps = layer.moving_mean.numpy().copy(), int(model.optimizer.iterations)
    model.fit(x, y, verbose=0)
    assert int(model.optimizer.iterations) == steps + 1
    assert (layer.moving_mean.numpy() != before).any() == (change == "compile")
