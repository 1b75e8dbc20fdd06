"""Domains: each has statistics of its own; numbers by the float64 reference, domain by domain."""

from __future__ import annotations

import pathlib
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, gradients, precision, tensor

import truenorm as tn
from truenorm import BatchNormalization, DataError, OptionError
from truenorm._kernels import reference, run_time

BACKEND = keras.config.backend()
RNG = np.random.default_rng(9)
MOMENTUM = 0.6
EPSILON = 1e-3


def layer_of(**options: Any) -> Any:
    return BatchNormalization(**{"momentum": MOMENTUM, "domains": 3, **options})


def rows(variable: Any) -> list[np.ndarray]:
    return list(array(variable))


def assert_rows(layer: Any, batches: dict[int, np.ndarray], axis: int = -1) -> None:
    """Each domain has taken one step toward its batch, or none."""
    for index, (mean, variance) in enumerate(
        zip(rows(layer.moving_mean), rows(layer.moving_variance), strict=True)
    ):
        wanted_mean, wanted_variance = np.zeros_like(mean), np.ones_like(variance)
        if index in batches:
            batch = reference.forward(batches[index], axis=axis)
            wanted_mean = reference.moving(wanted_mean, batch.mean, MOMENTUM)
            wanted_variance = reference.moving(wanted_variance, batch.variance, MOMENTUM)
        np.testing.assert_allclose(mean, wanted_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, wanted_variance, rtol=1e-5, atol=1e-6)


# --- which domain -------------------------------------------------------------------------------


def test_without_a_word_it_is_domain_zero() -> None:
    layer, x = layer_of(), RNG.normal(3, 2, (8, 2))
    found = array(layer(tensor(x), training=True))
    np.testing.assert_allclose(found, reference.forward(x).output, atol=1e-5)
    assert_rows(layer, {0: x})


def test_a_context_chooses_and_the_innermost_wins() -> None:
    layer, batches = layer_of(), [RNG.normal(i, 1 + i, (8, 2)) for i in range(3)]
    with tn.domain(2):
        layer(tensor(batches[2]), training=True)
        with tn.domain(1):
            layer(tensor(batches[1]), training=True)
    layer(tensor(batches[0]), training=True)
    assert_rows(layer, dict(enumerate(batches)))
    for index, batch in enumerate(batches):
        mean, variance = (rows(v)[index] for v in (layer.moving_mean, layer.moving_variance))
        expected = reference.infer(batch, mean, variance)
        with tn.domain(index):
            np.testing.assert_allclose(array(layer(tensor(batch))), expected, atol=1e-5)
        found = array(layer(tensor(batch), domain=index))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_context_ends_with_an_exception() -> None:
    layer, x = layer_of(), RNG.normal(3, 2, (8, 2))
    with pytest.raises(KeyError), tn.domain(2):
        raise KeyError
    layer(tensor(x), training=True)
    assert_rows(layer, {0: x})


def test_the_argument_of_the_call_wins_over_the_context() -> None:
    layer, x = layer_of(), RNG.normal(3, 2, (8, 2))
    with tn.domain(2):
        layer(tensor(x), training=True, domain=1)
    assert_rows(layer, {1: x})


@pytest.mark.parametrize("number", [np.int64(1), np.array(1), np.array([1] * 8)], ids=str)
def test_numbers_of_any_kind(number: Any) -> None:
    layer, x = layer_of(), RNG.normal(3, 2, (8, 2))
    layer(tensor(x), training=True, domain=number)
    assert_rows(layer, {1: x})


# --- samples of several domains in one batch ----------------------------------------------------

SHAPES = [((9, 2), -1), ((9, 4, 2), -1), ((9, 2, 4), 1), ((9, 3, 3, 2), -1)]


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_samples_are_normalised_with_their_domain(
    shape: Any, axis: int, affine: bool, activation: str | None
) -> None:
    domain = np.array([0, 2, 2, 0, 0, 2, 0, 2, 2])  # nothing of domain 1
    x = RNG.normal(5 * domain.reshape(-1, *[1] * (len(shape) - 1)), 2.0, shape)
    upstream = RNG.normal(size=shape)
    layer = layer_of(axis=axis, domain_affine=affine, activation=activation)
    layer.build(shape)
    gamma, beta = RNG.uniform(0.5, 2, (3, 2)), RNG.normal(size=(3, 2))
    if not affine:
        gamma[:], beta[:] = gamma[0], beta[0]
    layer.gamma.assign(gamma if affine else gamma[0])
    layer.beta.assign(beta if affine else beta[0])

    expected, of_x = np.zeros(shape), np.zeros(shape)
    of_gamma, of_beta = np.zeros((3, 2)), np.zeros((3, 2))
    for each in (0, 2):
        own = domain == each
        forward = reference.forward(x[own], gamma[each], beta[each], axis=axis)
        expected[own] = forward.output if activation is None else np.maximum(forward.output, 0)
        gradient = upstream[own] * (forward.output > 0) if activation else upstream[own]
        found = reference.backward(gradient, x[own], gamma[each], axis=axis)
        of_x[own], of_gamma[each], of_beta[each] = found.x, found.gamma, found.beta
    if not affine:
        of_gamma, of_beta = of_gamma.sum(0), of_beta.sum(0)

    learned = [layer.gamma, layer.beta]
    others = [v for v in layer.variables if not v.trainable]
    state = [v.value for v in others]

    def call(x: Any, *values: Any) -> Any:
        mapping = [*zip(learned, values, strict=True), *zip(others, state, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            return layer(x, training=True, domain=domain)

    values = [tensor(value if affine else value[0]) for value in (gamma, beta)]
    output, gradient = gradients(call, [tensor(x), *values], tensor(upstream))
    for value, true in zip((output, *gradient), (expected, of_x, of_gamma, of_beta), strict=True):
        value = value.detach() if BACKEND == "torch" else value
        np.testing.assert_allclose(array(value), true, rtol=1e-4, atol=2e-5)

    layer(tensor(x), training=True, domain=domain)
    assert_rows(layer, {each: x[domain == each] for each in (0, 2)}, axis)
    mean, variance = (array(v)[domain] for v in (layer.moving_mean, layer.moving_variance))
    spread = [1] * len(shape)
    spread[0], spread[axis] = 9, 2
    mean, variance, scale, offset = (
        v.reshape(spread) for v in (mean, variance, gamma[domain], beta[domain])
    )
    inferred = (x - mean) / np.sqrt(variance + EPSILON) * scale + offset
    found = array(layer(tensor(x), domain=domain))
    inferred = inferred if activation is None else np.maximum(inferred, 0)
    np.testing.assert_allclose(found, inferred, rtol=1e-4, atol=1e-5)


def test_masks_count_within_domains() -> None:
    x, domain = RNG.normal(3, 2, (8, 5, 2)), np.array([0, 1] * 4)
    mask = RNG.random((8, 5)) < 0.6
    layer = layer_of()
    layer(tensor(x), training=True, mask=tensor(mask, "bool"), domain=domain)
    for each in range(2):
        own = domain == each
        batch = reference.forward(x[own], mask=mask[own])
        np.testing.assert_allclose(
            rows(layer.moving_mean)[each], (1 - MOMENTUM) * batch.mean, rtol=1e-5
        )


def test_a_mask_of_keras_reaches_the_layer_with_domains() -> None:
    x, domain = RNG.normal(3, 2, (4, 5, 2)).astype("float32"), np.array([0, 1, 0, 1])
    x[:, 3:] = 0
    inputs, index = keras.Input((5, 2)), keras.Input((), dtype="int32")
    outputs = layer_of()(keras.layers.Masking()(inputs), domain=index)
    model = keras.Model([inputs, index], outputs)
    model.compile("sgd", "mse")
    model.train_on_batch([x, domain], x)
    batch = reference.forward(x[domain == 1][:, :3].astype("float64"))
    found = rows(model.layers[-1].moving_mean)[1]
    np.testing.assert_allclose(found, (1 - MOMENTUM) * batch.mean, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"renorm": True, "renorm_momentum": 0.5},
        {"momentum": None},
        {"bessel_correction": True},
        {"accumulation_steps": 2},
        {"freeze": "statistics"},
        {"freeze": "affine", "domain_affine": True},
        {"scale": False},
        {"center": False, "domain_affine": True},
    ],
    ids=str,
)
def test_each_domain_is_a_layer_of_its_own(options: dict[str, Any]) -> None:
    """Whatever the options: the same numbers as one layer for each domain."""
    layer = layer_of(domains=2, **options)
    plain = {"momentum": MOMENTUM, **options, "domain_affine": False}
    alone = [BatchNormalization(**plain) for _ in range(2)]
    domain = np.array([0, 1, 1, 0, 1, 1, 0, 1])
    for step in range(4):
        x = RNG.normal(4 * domain[:, None], 1 + step, (8, 2))
        found = array(layer(tensor(x), training=True, domain=domain))
        for each, one in enumerate(alone):
            expected = array(one(tensor(x[domain == each]), training=True))
            np.testing.assert_allclose(found[domain == each], expected, rtol=1e-4, atol=1e-5)
    names = {v.name for v in layer.weights if v.name not in ("gamma", "beta")}
    for name in names:
        for each, one in enumerate(alone):
            value = next(array(v) for v in one.weights if v.name == name)
            mine = next(array(v) for v in layer.weights if v.name == name)
            np.testing.assert_allclose(mine[each], value, rtol=1e-4, atol=1e-5)


def test_ghost_batches_with_domains_leave_the_other_domains_out() -> None:
    x, domain = RNG.normal(3, 2, (8, 2)), np.array([0, 0, 1, 1, 0, 0, 1, 1])
    layer = layer_of(virtual_batch_size=4)
    layer(tensor(x), training=True, domain=domain)
    ghosts = [x[i::2][domain[i::2] == 0] for i in range(2)]
    mean = np.mean([ghost.mean(0) for ghost in ghosts], 0)
    np.testing.assert_allclose(rows(layer.moving_mean)[0], (1 - MOMENTUM) * mean, rtol=1e-5)


def test_float64() -> None:
    x = RNG.normal(3, 2, (8, 2))
    with precision("float64"):
        layer = layer_of(dtype="float64")
        with tn.domain(1):
            layer(tensor(x, "float64"), training=True)
        found = rows(layer.moving_mean)[1]
    np.testing.assert_allclose(found, (1 - MOMENTUM) * x.mean(0), rtol=1e-14)


def test_half_precision() -> None:
    x = RNG.normal(3, 2, (8, 2))
    layer = layer_of(dtype="mixed_float16")
    with tn.domain(1):
        assert keras.backend.standardize_dtype(layer(tensor(x)).dtype) == "float16"
        layer(tensor(x), training=True)
    np.testing.assert_allclose(rows(layer.moving_mean)[1], (1 - MOMENTUM) * x.mean(0), rtol=2e-3)


# --- in programs --------------------------------------------------------------------------------


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_fit_and_predict_obey_the_context_though_they_were_compiled_before(
    run_eagerly: bool,
) -> None:
    model = keras.Sequential([keras.Input((2,)), layer_of()])
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=run_eagerly)
    batches = [RNG.normal(4 * i, 1 + i, (8, 2)).astype("float32") for i in range(3)]
    for index in (0, 2, 1):
        with tn.domain(index):
            model.fit(batches[index], batches[index], batch_size=8, verbose=0)
    layer = model.layers[0]
    assert_rows(layer, {i: b.astype("float64") for i, b in enumerate(batches)})
    for index in (1, 2):
        with tn.domain(index):
            found = model.predict(batches[0], verbose=0)
        mean, variance = (rows(v)[index] for v in (layer.moving_mean, layer.moving_variance))
        np.testing.assert_allclose(found, reference.infer(batches[0], mean, variance), atol=1e-4)
    mean, variance = (rows(v)[0] for v in (layer.moving_mean, layer.moving_variance))
    found = model.predict(batches[0], verbose=0)
    np.testing.assert_allclose(found, reference.infer(batches[0], mean, variance), atol=1e-4)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_two_domains_in_one_step_that_is_traced(run_eagerly: bool) -> None:
    """As in adversarial training: each step sees clean samples and others."""

    class Both(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer_of(domains=2)

        def build(self, shape: Any) -> None:
            self.norm.build(shape)

        def call(self, x: Any, training: bool | None = None) -> Any:
            clean = self.norm(x, training=training)
            with tn.domain(1):
                other = self.norm(x * 2.0 + 1.0, training=training)
            return clean + other

    model = Both()
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=run_eagerly)
    x = RNG.normal(3, 2, (8, 2)).astype("float32")
    model.fit(x, x, batch_size=8, epochs=1, verbose=0)
    assert_rows(model.norm, {0: x.astype("float64"), 1: 2.0 * x + 1.0})
    model.fit(x, x, batch_size=8, epochs=1, verbose=0)
    for index, batch in enumerate((x, 2.0 * x + 1.0)):
        mean = (1 - MOMENTUM**2) * batch.mean(0)
        np.testing.assert_allclose(rows(model.norm.moving_mean)[index], mean, rtol=1e-5)


def test_an_input_chooses_for_each_sample_in_fit() -> None:
    inputs, index = keras.Input((2,)), keras.Input((), dtype="int32")
    model = keras.Model([inputs, index], layer_of()(inputs, domain=index))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    domain = np.array([0, 1, 1, 2, 2, 2, 0, 1], "int32")
    x = RNG.normal(domain[:, None], 1, (8, 2)).astype("float32")
    model.fit([x, domain], x, batch_size=8, verbose=0)
    assert_rows(model.layers[-1], {d: x[domain == d].astype("float64") for d in range(3)})
    domain[3] = 7
    if run_time.numbers(tensor(domain)) is not None and BACKEND == "torch":  # not on a GPU
        with pytest.raises(OptionError, match="has no such domain"):
            model.predict([x, domain], verbose=0)
        return
    found = model.predict([x, domain], verbose=0)
    assert np.isnan(found).any(1).tolist() == [d == 7 for d in domain]


def test_a_number_between_two_domains_is_none() -> None:
    inputs, index = keras.Input((2,)), keras.Input(())
    model = keras.Model([inputs, index], layer_of()(inputs, domain=index))
    x, domain = RNG.normal(3, 2, (4, 2)).astype("float32"), np.array([0, 1, 0.5, 2], "float32")
    if run_time.numbers(tensor(domain)) is not None and BACKEND == "torch":  # not on a GPU
        with pytest.raises(OptionError, match=r"Received: domain 0\.5"):
            model.predict([x, domain], verbose=0)
        return
    found = model.predict([x, domain], verbose=0)
    assert np.isnan(found).any(1).tolist() == [False, False, True, False]


# --- files, freezing ----------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
def test_a_model_comes_back_from_its_file(tmp_path: pathlib.Path, affine: bool) -> None:
    layer = layer_of(domain_affine=affine, renorm=True)
    model = keras.Sequential([keras.Input((2,)), layer])
    x = RNG.normal(3, 2, (8, 2))
    with tn.domain(1):
        model(tensor(x), training=True)
        model.save(tmp_path / "model.keras")
        expected = array(model(tensor(x)))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].get_config() == layer.get_config()
    for ours, theirs in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs))
    assert np.abs(array(loaded(tensor(x))) - expected).max() > 0.1  # outside it is domain 0
    with tn.domain(1):
        np.testing.assert_array_equal(array(loaded(tensor(x))), expected)


def test_a_file_is_read_without_a_model_and_loaded_confined(tmp_path: pathlib.Path) -> None:
    layer = layer_of(domain_affine=True, accumulation_steps=2, name="bn")
    model = keras.Sequential([keras.Input((2,)), layer])
    layer.moving_variance.assign([[1, 2], [3, 4], [5, -6]])
    model.save(tmp_path / "model.keras")
    (found,) = tn.archive.read(tmp_path / "model.keras").layers
    assert (found.channels, found.statistics.negative) == (2, 1)
    assert found.statistics.largest_variance == 5
    loaded = tn.archive.load(tmp_path / "model.keras").layers[0]
    for ours, theirs in zip(loaded.weights, layer.weights, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs))


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_freeze_holds_every_domain() -> None:
    model = keras.Sequential([keras.Input((2,)), layer_of(domain_affine=True)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = RNG.normal(3, 2, (8, 2)).astype("float32")
    for policy, held in (
        ("all", {"gamma", "beta", "moving_mean", "moving_variance"}),
        ("statistics", {"moving_mean", "moving_variance"}),
        ("affine", {"gamma", "beta"}),
    ):
        tn.freeze(model, policy)
        before = [array(v) for v in model.weights]
        for index in range(3):
            with tn.domain(index):
                model.fit(x, 2 * x, batch_size=8, verbose=0)
        for variable, old in zip(model.weights, before, strict=True):
            moved = (array(variable) != old).any(1)
            assert moved.tolist() == [variable.name not in held] * 3, (policy, variable.name)


# --- bad use ------------------------------------------------------------------------------------


def test_there_is_no_such_domain() -> None:
    layer, x = layer_of(name="bn"), RNG.normal(3, 2, (4, 2))
    message = (
        "BatchNormalization has no such domain (at 'bn'). Expected: one of its 3 domains, from 0 "
        "to 2. Received: domain 3."
    )
    for index in (3, [0, 1, 3, 0]):
        # The numbers of a tensor on a GPU are not waited for.
        with pytest.raises(OptionError) as caught, keras.device("cpu:0"):
            layer(tensor(x), domain=index)
        assert message in str(caught.value)
    with pytest.raises(OptionError) as caught, tn.domain(3):
        layer(tensor(x))
    assert message in str(caught.value)


def test_a_domain_that_is_no_number() -> None:
    with pytest.raises(OptionError) as caught, tn.domain(-1):
        pass
    assert str(caught.value) == "domain must be 0 or a positive integer. Received: -1."
    layer = layer_of(name="bn")
    with pytest.raises(DataError) as wrong:
        layer(tensor(RNG.normal(size=(4, 2))), domain=np.zeros((4, 2), int))
    assert (
        "The domain of BatchNormalization is one number, or one for each sample (at 'bn'). "
        "Expected: shape () or (samples,). Received: shape (4, 2)."
    ) in str(wrong.value)


def test_a_layer_without_domains_takes_none() -> None:
    layer = BatchNormalization(name="bn")
    with pytest.raises(OptionError) as caught:
        layer(tensor(RNG.normal(size=(4, 2))), domain=1)
    assert (
        "BatchNormalization was called with a domain, and has none (at 'bn'). Expected: a layer "
        "made with domains=n. Received: domain=... in the call, domains=None."
    ) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": 0}, "domains must be a positive integer. Received: 0."),
        (
            {"domain_affine": True},
            "BatchNormalization has domain_affine, and no domains. Expected: both or neither: it "
            "gives each domain gamma and beta of its own. "
            "Received: domain_affine=True, domains=None.",
        ),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        BatchNormalization(**options)
    assert str(caught.value) == message


def test_domains_of_channels() -> None:
    with pytest.raises(OptionError) as caught:
        BatchNormalization(domains=2, axis=0, name="bn").build((3, 4))
    assert str(caught.value) == (
        "Domains are parts of the first axis, and here that holds the channels (at 'bn'). "
        "Expected: another channel axis than 0, or no domains. Received: axis=0, domains=2."
    )
