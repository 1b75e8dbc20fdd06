"""replace: layers that no graph shows. The oracle is the model that was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from small_models import predict, shake, snapshot

import truenorm as tn
import truenorm._model.rebuild

pytestmark = pytest.mark.any_backend

L = keras.layers
SERIES = np.random.default_rng(0).normal(size=(8, 3, 5)).astype("float32")
TARGETS = np.ones((8, 4), "float32")


class Block(L.Layer):
    """Layers in a list, in a dict, and in a list in it."""

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(**options)
        self.dense = [L.Dense(units), L.Dense(units)]
        self.norms = {"first": L.BatchNormalization(name="a"), "rest": [L.BatchNormalization()]}

    def build(self, shape: Any) -> None:
        wide = (*shape[:-1], self.dense[0].units)
        self.dense[0].build(shape)
        for layer in (self.dense[1], self.norms["first"], *self.norms["rest"]):
            layer.build(wide)

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = keras.ops.relu(self.norms["first"](self.dense[0](x), training=training))
        return self.norms["rest"][0](self.dense[1](x), training=training)


class Cell(L.Layer):
    """Of an RNN."""

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(**options)
        self.state_size = units
        self.dense, self.norm = L.Dense(units), L.BatchNormalization()

    def build(self, shape: Any) -> None:
        self.dense.build((shape[0], shape[-1] + self.state_size))
        self.norm.build((shape[0], self.state_size))

    def call(self, x: Any, states: Any, training: bool | None = None) -> Any:
        y = self.dense(keras.ops.concatenate([x, states[0]], axis=-1))
        y = self.norm(y, training=training)
        return y, [y]


class Net(keras.Model):
    """A subclassed model with blocks, wrappers, a cell, and models of both other kinds in it."""

    def __init__(self) -> None:
        super().__init__(name="net")
        self.block = Block(4, name="block")
        self.steps = L.TimeDistributed(L.BatchNormalization(name="bn"), name="steps")
        self.chain = keras.Sequential([keras.Input((3, 4)), L.Dense(4), L.BatchNormalization()])
        inputs = keras.Input((3, 4))
        self.graph = keras.Model(inputs, L.BatchNormalization(name="bn")(inputs), name="graph")
        self.rnn = L.RNN(Cell(4), name="rnn", unroll=True)

    def call(self, x: Any, training: bool | None = None) -> Any:
        for layer in (self.block, self.steps, self.chain, self.graph, self.rnn):
            x = layer(x, training=training)
        return x


def net() -> Any:
    model = Net()
    model(SERIES)
    return shake(model)


def functional() -> Any:
    """The same in a graph."""
    x = inputs = keras.Input((3, 5))
    x = L.TimeDistributed(L.BatchNormalization(name="bn"), name="steps")(Block(4, name="block")(x))
    return shake(keras.Model(inputs, L.RNN(Cell(4), unroll=True)(x)))


def normalizing(model: Any) -> list[Any]:
    return [k for k in model._flatten_layers() if isinstance(k, L.BatchNormalization)]


@pytest.mark.parametrize(("build", "sites"), [(net, 6), (functional, 4)])
def test_there_and_back(build: Callable[[], Any], sites: int) -> None:
    model = build()
    before = snapshot(model)
    there = tn.replace(model, to="truenorm", probe=SERIES)
    assert (len(there.changed), there.left) == (sites, ())
    assert {type(k) for k in normalizing(there.model)} == {tn.BatchNormalization}
    assert type(there.model) is type(model)
    back = tn.replace(there.model, to="keras", probe=SERIES)
    assert {type(k) for k in normalizing(back.model)} == {L.BatchNormalization}
    for rewrite in (there, back):
        ours, theirs = predict(rewrite.model, SERIES)[0], predict(model, SERIES)[0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert rewrite.max_rel_error is not None
        assert rewrite.max_site_error is not None
        assert max(rewrite.max_rel_error, rewrite.max_site_error) < 1e-5
    for ours, theirs in zip(back.model.variables, model.variables, strict=True):
        assert (ours.path, ours.trainable) == (theirs.path, theirs.trainable)
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert snapshot(model) == before


def test_what_is_set_on_layers_and_variables_is_carried() -> None:
    model = net()
    model.block.norms["first"].trainable = False
    model.steps.layer.beta.trainable = False
    model.rnn.cell.norm.dtype_policy = "mixed_bfloat16"
    new = tn.replace(model, to="truenorm").model
    assert not new.block.norms["first"].trainable
    norm = new.steps.layer
    assert (norm.gamma.trainable, norm.beta.trainable) == (True, False)
    assert new.rnn.cell.norm.dtype_policy.name == "mixed_bfloat16"
    assert [k.name for k in normalizing(new)] == [k.name for k in normalizing(model)]


@pytest.mark.parametrize("build", [net, functional])
def test_the_new_model_trains_and_can_be_frozen_in_part(build: Callable[[], Any]) -> None:
    model = build()
    model.compile("adam", "mse")
    new = tn.replace(model, to="truenorm").model
    new.fit(SERIES, TARGETS, verbose=0)
    before = [np.array(k.moving_mean.numpy()) for k in normalizing(new)]
    tn.freeze(new, "statistics")
    gamma = np.array(normalizing(new)[0].gamma.numpy())
    new.fit(SERIES, TARGETS, verbose=0)
    for old, layer in zip(before, normalizing(new), strict=True):
        np.testing.assert_array_equal(layer.moving_mean.numpy(), old)
    assert (normalizing(new)[0].gamma.numpy() != gamma).any()


def test_the_receipt_says_what_is_not_carried() -> None:
    model = net()
    model.compile("adam", "mse")
    model.fit(SERIES, TARGETS, verbose=0)
    assert tn.replace(model, to="truenorm").notes == (
        "The outputs were not compared, since nobody knows what a subclassed model takes: give a "
        "probe of your own data. Each changed site was compared by itself, on random numbers.",
        "The optimizer starts anew: what it has gathered of the old model (momentum, averages) is "
        "not carried over.",
        "Layers inside Net, Block, Cell are made by a constructor: a file that is loaded has them "
        "as that one makes them. Change it there too, if the model is to be saved.",
    )


def test_a_wrong_value_gives_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    carry = truenorm._model.rebuild.carry_values

    def carry_wrong(old: Any, new: Any, values: Any) -> None:
        carry(old, new, values)
        if new.name == "a":
            new.moving_mean.assign(new.moving_mean + 0.01)

    model = net()
    monkeypatch.setattr("truenorm._model.rebuild.carry_values", carry_wrong)
    with pytest.raises(tn.VerificationError, match=r"^Replacing would change .* \(at 'block/a'\)"):
        tn.replace(model, to="truenorm")


def test_a_probe_that_a_subclassed_model_does_not_take() -> None:
    with pytest.raises(tn.DataError, match=r"^The model does not take this input"):
        tn.replace(net(), to="truenorm", probe=SERIES[..., :2])


class Own(L.BatchNormalization):
    pass


def test_a_class_of_somebodys_own_is_left_and_no_remedy_says_otherwise() -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Own(name="own")(inputs))
    (left,) = tn.replace(model, to="truenorm").left
    assert left.reason == "its class Own is a custom subclass"
    with pytest.raises(tn.ModelError, match=r"Remedy: derive its class from truenorm\.Batch"):
        tn.freeze(model, "statistics")


class Stepping(keras.Model):
    """A graph with a constructor and a training step of its own."""

    def __init__(self, units: int) -> None:
        inputs = keras.Input((5,))
        outputs = L.Dense(units)(L.BatchNormalization(name="bn")(inputs))
        super().__init__(inputs, outputs)
        self.units, self.steps = units, 0

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        return super().train_step(*args, **kwargs)


def test_a_training_step_of_the_users_own_is_kept() -> None:
    model = Stepping(4)
    model.compile("sgd", "mse", run_eagerly=True)
    new = tn.replace(model, to="truenorm").model
    assert type(new) is Stepping
    assert type(new.get_layer("bn")) is tn.BatchNormalization
    new.compile("sgd", "mse", run_eagerly=True)
    new.fit(SERIES[:, 0], TARGETS, verbose=0)
    assert new.steps >= 1
    assert model.steps == 0


class Pinned(L.Layer):
    """Holds a compiled function over its own layer, which nothing can copy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = L.BatchNormalization(name="bn")
        self.compiled = compiled(self.norm)

    def build(self, shape: Any) -> None:
        self.norm.build(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.norm(x, training=training)


def compiled(layer: Any) -> Any:
    def run(x: Any) -> Any:
        return layer(x, training=False)

    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.jit(run)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(run)
    run.__wrapped__ = run  # PyTorch's are closures that can be copied
    return run


def pinned(frozen: bool) -> Any:
    """Frozen outside and not inside, so that the statistics move."""
    inputs = keras.Input((5,))
    block = Pinned(name="block")
    model = keras.Model(inputs, L.Dense(1)(block(inputs)))
    block.trainable = not frozen
    block.norm.trainable = True
    return model


@pytest.mark.skipif(keras.config.backend() == "torch", reason="there every function is copied")
def test_where_nothing_can_be_replaced_no_remedy_says_so() -> None:
    model = pinned(frozen=True)
    with pytest.raises(tn.ModelError, match="A layer holds a compiled function"):
        tn.replace(model, to="truenorm")
    (finding,) = tn.diagnose(model, select="TN107").findings
    assert finding.remedy == "tn.freeze(model, layers='block/bn')"
    model.layers[1].norm.moving_mean.assign([5e3] * 5)
    (finding,) = tn.diagnose(model, select="TN106").findings
    assert finding.remedy == "keras.layers.Normalization() before the model"
