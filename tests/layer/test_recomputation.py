"""Forward passes that run again in the backward pass: one step of the statistics, not two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, tensor

import truenorm as tn
from truenorm._kernels import reference

# PyTorch's reentrant mode says so while Keras looks for shapes.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

BACKEND = keras.config.backend()
RNG = np.random.default_rng(6)
X = RNG.normal(4, 2, (16, 5)).astype("float32")
Y = RNG.normal(size=(16, 3)).astype("float32")
EPSILON = 1e-3
MOMENTUM = 0.5


@pytest.fixture(autouse=True)
def _in_order() -> Iterator[None]:
    """TensorFlow's optimizer of graphs drops what orders a recomputed read and a later write."""
    if BACKEND != "tensorflow":
        yield
        return
    from tensorflow import config

    optimizer: Any = config.optimizer
    before = optimizer.get_experimental_options().get("dependency_optimization", True)
    optimizer.set_experimental_options({"dependency_optimization": False})
    yield
    optimizer.set_experimental_options({"dependency_optimization": before})


def plain(function: Any) -> Any:
    return function


def by_torch(*, reentrant: bool) -> Callable[[Any], Any]:
    from torch.utils.checkpoint import checkpoint

    def wrap(function: Any) -> Any:
        return lambda x: checkpoint(function, x, use_reentrant=reentrant)

    return wrap


def wraps() -> dict[str, Callable[[Any], Any]]:
    """Each way of this backend to have a function recomputed."""
    found: dict[str, Callable[[Any], Any]] = {"tn.remat": tn.remat, "keras.remat": keras.remat}
    if BACKEND == "torch":
        found["reentrant"] = by_torch(reentrant=True)
        found["not reentrant"] = by_torch(reentrant=False)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        found["tf.recompute_grad"] = tf.recompute_grad
    elif BACKEND == "jax":
        import jax

        found["jax.checkpoint"] = jax.checkpoint
    return found


WRAPS = wraps()
ALONE = {"jax": ["tn.remat"]}.get(BACKEND, list(WRAPS))
"""Those in which a layer may change its statistics by itself."""


class Block(keras.layers.Layer):
    """Two dense layers and two of normalisation, recomputed as one."""

    def __init__(self, wrap: Any, kind: Any = tn.BatchNormalization, **options: Any) -> None:
        super().__init__()
        self.wrap = wrap
        self.first, self.second = keras.layers.Dense(4), keras.layers.Dense(3)
        self.norms = [kind(momentum=MOMENTUM, epsilon=EPSILON, **options) for _ in range(2)]

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.second.build((None, 4))
        for norm, channels in zip(self.norms, (4, 3), strict=True):
            norm.build((None, channels))

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:-1], 3)

    def call(self, x: Any, training: bool | None = None) -> Any:
        def run(x: Any) -> Any:
            x = self.norms[0](self.first(x), training=training)
            return self.norms[1](self.second(x), training=training)

        return self.wrap(run)(x)


def trained(make: Callable[[], Any], *, run_eagerly: bool = False, steps: int = 1) -> Any:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5), make()])
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=run_eagerly)
    for _ in range(steps):
        model.train_on_batch(X, Y)
    return model


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_allclose(array(ours), array(theirs), rtol=2e-5, atol=2e-6)


def oracle() -> list[np.ndarray]:
    """Moving mean and variance of both layers after one step, in float64."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5), Block(plain)])
    block = model.layers[-1]
    x = X.astype("float64") @ array(model.layers[0].kernel)
    statistics = []
    for dense in (block.first, block.second):
        x = x @ array(dense.kernel) + array(dense.bias)
        batch = reference.forward(x, epsilon=EPSILON)
        x = batch.output
        for start, value in ((0.0, batch.mean), (1.0, batch.variance)):
            old = np.full_like(value, start)
            statistics.append(reference.moving(old, value, MOMENTUM))
    return statistics


def statistics(block: Any) -> list[np.ndarray]:
    pairs = [(norm.moving_mean, norm.moving_variance) for norm in block.norms]
    return [array(variable) for pair in pairs for variable in pair]


EAGERLY = [False, True] if BACKEND == "tensorflow" else [False]


@pytest.mark.parametrize("run_eagerly", EAGERLY)
@pytest.mark.parametrize("name", ALONE)
def test_a_block_takes_one_step(name: str, run_eagerly: bool) -> None:
    found = trained(lambda: Block(WRAPS[name]), run_eagerly=run_eagerly)
    for value, true in zip(statistics(found.layers[-1]), oracle(), strict=True):
        np.testing.assert_allclose(value, true, rtol=1e-5, atol=1e-6)
    assert_same(found, trained(lambda: Block(plain)))


@pytest.mark.parametrize("name", ALONE)
def test_a_single_layer_takes_one_step(name: str) -> None:
    class One(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = tn.BatchNormalization(momentum=MOMENTUM)

        def build(self, shape: Any) -> None:
            self.norm.build(shape)

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

        def call(self, x: Any, training: bool | None = None) -> Any:
            return WRAPS[name](lambda x: self.norm(x, training=training))(x)

    first = keras.layers.Dense(5, kernel_initializer="identity")  # a checkpoint needs a gradient
    model = keras.Sequential([keras.Input((5,)), first, One()])
    model.compile("sgd", "mse")
    model.train_on_batch(X, X)
    np.testing.assert_allclose(
        array(model.layers[1].norm.moving_mean), MOMENTUM * X.mean(0), rtol=1e-5
    )


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(
    "options",
    [
        {"virtual_batch_size": 8},
        {"activation": "relu"},
        {"accumulation_steps": 2},
        {"freeze": "affine"},
    ],
    ids=str,
)
def test_options_take_the_steps_of_the_same_model_without(name: str, options: Any) -> None:
    found = trained(lambda: Block(WRAPS[name], **options), steps=3)
    assert_same(found, trained(lambda: Block(plain, **options), steps=3))


@pytest.mark.parametrize("steps", [1, 3])
def test_remat_repeats_what_it_ran_even_with_renorm(steps: int) -> None:
    options = {"renorm": True, "renorm_momentum": 0.5}
    found = trained(lambda: Block(tn.remat, **options), steps=steps)
    assert_same(found, trained(lambda: Block(plain, **options), steps=steps))


def test_remat_works_for_layers_of_others() -> None:
    """Random numbers too: what is repeated draws the same."""

    def make(wrap: Any) -> Any:
        block = Block(plain, keras.layers.BatchNormalization)
        dropout = keras.layers.Dropout(0.5, seed=1)

        class Random(keras.layers.Layer):
            def __init__(self) -> None:
                super().__init__()
                self.block, self.dropout = block, dropout

            def build(self, shape: Any) -> None:
                self.block.build(shape)

            def compute_output_shape(self, shape: Any) -> Any:
                return (*shape[:-1], 3)

            def call(self, x: Any, training: bool | None = None) -> Any:
                def run(x: Any, *, scale: float) -> Any:
                    x = self.dropout(scale * x, training=training)
                    return {"y": self.block(x, training=training), "none": x}

                return wrap(run)(x, scale=2.0)["y"]

        return Random()

    found = trained(lambda: make(tn.remat), steps=2)
    expected = trained(lambda: make(plain), steps=2)
    assert_same(found, expected)
    if BACKEND == "jax":
        return
    other = trained(
        lambda: make(lambda f: lambda x, scale: keras.remat(partial(f, scale=scale))(x))
    )
    kernel, right = other.weights[0], trained(lambda: make(plain)).weights[0]
    assert np.abs(array(kernel) - array(right)).max() > 1e-3  # it drew others for the gradient


def test_a_loss_inside_is_refused() -> None:
    dense = keras.layers.Dense(3, activity_regularizer="l2")
    with pytest.raises(tn.TruenormError) as caught:
        tn.remat(dense)(tensor(X))
    assert str(caught.value) == (
        "What a recomputed function adds to the loss cannot leave it. Expected: a function that "
        "gives all it computes as results. Received: a call of add_loss. Remedy: return it, and "
        "add it to the loss outside."
    )


def test_under_rematscope_each_layer_takes_one_step() -> None:
    def make() -> Any:
        with keras.RematScope("full"):
            return tn.BatchNormalization(momentum=MOMENTUM, renorm=True, renorm_momentum=0.5)

    def normal() -> Any:
        return tn.BatchNormalization(momentum=MOMENTUM, renorm=True, renorm_momentum=0.5)

    def model(make: Callable[[], Any]) -> Any:
        keras.utils.set_random_seed(3)
        layers = [keras.layers.Dense(4), make(), keras.layers.Dense(3), make()]
        found = keras.Sequential([keras.Input((5,)), *layers])
        found.compile(keras.optimizers.SGD(0.1), "mse")
        for _ in range(2):
            found.train_on_batch(X, Y)
        return found

    assert_same(model(make), model(normal))


def inside_domain(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The forward pass is of domain 1; what recomputes it runs outside of that context."""

    def wrapped(function: Any) -> Any:
        def run(x: Any) -> Any:
            with tn.domain(1):
                return wrap(function)(x)

        return run

    return wrapped


@pytest.mark.parametrize("options", [{}, {"domains": 2, "domain_affine": True}], ids=str)
def test_gradients_are_those_without_recomputation(options: Any) -> None:
    block = Block(plain, **options)
    block.build((None, 5))
    for weight in block.trainable_variables:  # The domains' are not alike.
        weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    kept = [np.array(array(variable)) for variable in block.variables]
    found = []
    for wrap in (plain, tn.remat):
        for variable, value in zip(block.variables, kept, strict=True):
            variable.assign(value)
        block.wrap = inside_domain(wrap) if options else wrap
        found.append(gradients(block))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def gradients(block: Any) -> list[np.ndarray]:
    """Of a loss, for the weights of a block."""
    x = tensor(X)
    if BACKEND == "torch":
        for weight in block.trainable_variables:
            weight.value.grad = None
        keras.ops.sum(block(x, training=True) ** 3).backward()
        return [array(weight.value.grad) for weight in block.trainable_variables]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = keras.ops.sum(block(x, training=True) ** 3)
        return [array(g) for g in tape.gradient(loss, [w.value for w in block.trainable_variables])]
    import jax

    def loss_of(learned: Any, others: Any) -> Any:
        y, _ = block.stateless_call(learned, others, x, training=True)
        return keras.ops.sum(y**3)

    learned, others = (
        [v.value for v in found]
        for found in (block.trainable_variables, block.non_trainable_variables)
    )
    return [array(g) for g in jax.grad(loss_of)(learned, others)]


def in_a_scope(kind: Any) -> Any:
    """Of what Keras makes a scope for: a layer alone, or a block and all in it."""
    with keras.RematScope("full"):
        return Block(plain, kind)


def nested(kind: Any) -> np.ndarray:
    model = trained(lambda: in_a_scope(kind), run_eagerly=BACKEND == "tensorflow")
    return statistics(model.layers[-1])[0]


@pytest.mark.parametrize("kind", [tn.BatchNormalization, keras.layers.BatchNormalization])
def test_the_tools_see_into_it(kind: Any) -> None:
    found, expected = trained(lambda: Block(tn.remat, kind)), trained(lambda: Block(plain, kind))
    populations = [tn.collect(model, X, batch_size=8) for model in (found, expected)]
    mine, theirs = (list(population.sites.values()) for population in populations)
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(one.variance, other.variance, rtol=1e-6)
        assert (one.count == len(X)).all()
    for mode in tn.inspect(found, X, Y).modes["fit"]:  # how often it ran is not the same
        assert (mode.updated, mode.learned) == (True, True)
        assert {call.statistics for call in mode.calls} == {"batch"}


@pytest.mark.skipif(BACKEND == "jax", reason="there it fails, as without renorm")
def test_the_framework_alone_repeats_renorm_with_other_statistics() -> None:
    options = {"renorm": True, "renorm_momentum": 0.5}
    found, exact = (trained(lambda w=wrap: Block(w, **options)) for wrap in (keras.remat, plain))
    for one, other in zip(*map(statistics, (found.layers[-1], exact.layers[-1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # one step, as ever
    assert np.abs(array(found.weights[0]) - array(exact.weights[0])).max() > 1e-3


@pytest.mark.skipif(BACKEND != "tensorflow", reason="about tf.function")
def test_a_function_that_tensorflow_traces_once_for_both_passes() -> None:
    import tensorflow as tf

    inside = trained(lambda: Block(lambda f: tf.recompute_grad(partial(tf.function(f)))))
    outside = trained(lambda: Block(lambda f: tf.function(tf.recompute_grad(f))))
    once = oracle()[0]
    np.testing.assert_allclose(statistics(inside.layers[-1])[0], 1.5 * once, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics(outside.layers[-1])[0], once, rtol=1e-5, atol=1e-6)


# --- what does not work, and what Keras's layer does: docs/training.md says so ------------------

STOCK = keras.layers.BatchNormalization
UNABLE = "UnexpectedTracerError|Unable to automatically build|keywords arguments only"


@pytest.mark.parametrize("name", [name for name in WRAPS if name != "tn.remat"])
def test_a_recomputed_block_of_keras_layers_takes_two_steps_or_fails(name: str) -> None:
    if BACKEND == "jax":
        for kind in (STOCK, tn.BatchNormalization):
            with pytest.raises(Exception, match=UNABLE):
                trained(lambda kind=kind: Block(WRAPS[name], kind))
        return
    found = statistics(trained(lambda: Block(WRAPS[name], STOCK)).layers[-1])[0]
    # From 0 by half of the way twice: three quarters, where one step makes a half.
    np.testing.assert_allclose(found, oracle()[0] * 1.5, rtol=1e-5, atol=1e-6)


def test_a_block_in_a_rematscope_takes_one_step_and_of_keras_layers_three() -> None:
    """Keras recomputes the block, and each layer in it."""
    if BACKEND == "jax":
        for kind in (STOCK, tn.BatchNormalization):
            with pytest.raises(Exception, match=UNABLE):
                nested(kind)
        return
    np.testing.assert_allclose(nested(tn.BatchNormalization), oracle()[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nested(STOCK), oracle()[0] * 1.75, rtol=1e-5, atol=1e-6)
    if BACKEND == "tensorflow":  # in a graph Keras cannot
        with pytest.raises(ValueError, match=UNABLE):
            trained(lambda: in_a_scope(tn.BatchNormalization))


def test_one_of_keras_layers_in_a_rematscope_takes_two_steps_or_fails() -> None:
    def make() -> Any:
        with keras.RematScope("full"):
            return STOCK(momentum=MOMENTUM)

    def model(*, run_eagerly: bool) -> Any:
        first = keras.layers.Dense(5, kernel_initializer="identity")
        found = keras.Sequential([keras.Input((5,)), first, make()])
        found.compile("sgd", "mse", run_eagerly=run_eagerly)
        found.train_on_batch(X, X)
        return found.layers[-1].moving_mean

    if BACKEND != "torch":
        with pytest.raises(Exception, match=UNABLE):
            model(run_eagerly=False)
    if BACKEND != "jax":
        found = array(model(run_eagerly=True))
        np.testing.assert_allclose(found, 0.75 * X.mean(0), rtol=1e-5)


def test_a_checkpoint_of_a_stateless_call_takes_one_step() -> None:
    """As one does with JAX: the statistics are results."""
    block = trained(lambda: Block(plain)).layers[-1]
    learned, others = block.trainable_variables, block.non_trainable_variables
    values = [variable.value for variable in (*learned, *others)]

    def call(*values: Any) -> Any:
        parts = values[: len(learned)], values[len(learned) :]
        y, state = block.stateless_call(*parts, tensor(X), training=True)
        return [y, *state]

    found, expected = (one(*values) for one in (keras.remat(call), call))
    for pair in zip(found, expected, strict=True):
        one, other = (array(v.detach() if BACKEND == "torch" else v) for v in pair)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    moved = array(found[1 + [v.path for v in others].index(block.norms[0].moving_mean.path)])
    assert np.abs(moved - array(block.norms[0].moving_mean)).min() > 1e-3
