"""What looks past a kernel: other modes of differentiation, hooks, tracers, default devices."""

from __future__ import annotations

import importlib
from typing import Any

import keras
import numpy as np
import pytest
from fresh_process import output_of
from layer_cases import EPSILON, array, error, gradients, tensor

from truenorm import BatchNormalization
from truenorm import _kernels as kernels
from truenorm._kernels import composite, library, reference
from truenorm._kernels.contract import Options

BACKEND = keras.config.backend()
pytestmark = pytest.mark.usefixtures("where_keras_computes")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="about PyTorch")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
RNG = np.random.default_rng(5)
X = RNG.normal(3, 2, (6, 3)).astype("float32")


def layer(**options: Any) -> Any:
    made = BatchNormalization(**options)
    made.build((None, 3))
    return made


@on_torch
def test_another_default_device() -> None:
    import torch

    made, x = layer(momentum=0.0), torch.tensor(X)
    with torch.device("meta"):
        output = made(x, training=True)
    assert error(array(output.detach()), reference.forward(X).output) < 1e-6


@on_torch
def test_forward_mode_in_inference() -> None:
    import torch

    made = layer(trainable=False)
    found = [
        torch.autograd.functional.jacobian(
            made, torch.tensor(X), strategy=strategy, vectorize=strategy == "forward-mode"
        )
        for strategy in ("forward-mode", "reverse-mode")
    ]
    assert float(found[0].abs().sum()) > 1
    np.testing.assert_allclose(*(array(f) for f in found), atol=1e-6)


@on_torch
def test_hooks_that_order_what_is_kept_anew() -> None:
    import torch

    x = torch.tensor(RNG.normal(3, 2, (4, 6, 7, 5)).astype("float32")).movedim(1, -1)
    leaf, dy = x.detach().requires_grad_(), torch.tensor(RNG.normal(size=x.shape), dtype=x.dtype)

    def unpack(kept: Any) -> Any:
        return torch.tensor(kept, device=x.device)

    hooks = (lambda t: t.detach().cpu().numpy().copy(order="C"), unpack)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        output = kernels.normalize(leaf, None, None, Options(-1, EPSILON)).output
    (d_x,) = torch.autograd.grad(output, leaf, dy)
    assert error(array(d_x), reference.backward(array(dy), array(x)).x) < 1e-6


@on_torch
def test_a_tracer_of_operations_sees_operations() -> None:
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    made, x = layer(trainable=False), torch.tensor(X)
    traced = make_fx(lambda t: made(t, training=False))(x)
    np.testing.assert_allclose(array(traced(2 * x)), array(made(2 * x)), atol=1e-6)


@on_torch
def test_many_gradients_at_once() -> None:
    import torch

    def loss(x: Any) -> Any:
        return kernels.normalize(x, None, None, Options(-1, EPSILON)).output.pow(3).sum(1)

    one, all_at_once = (
        torch.autograd.functional.jacobian(loss, torch.tensor(X), vectorize=vectorize)
        for vectorize in (False, True)
    )
    np.testing.assert_allclose(array(one), array(all_at_once), atol=1e-5)


@on_tensorflow
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_accumulators_and_vectorized_maps(relu: bool, masked: bool) -> None:
    import tensorflow as tf

    x, toward = tf.constant(X), tf.constant(RNG.normal(size=X.shape).astype("float32"))
    mask = np.arange(len(X)) % 3 < 2 if masked else None
    options = Options(-1, EPSILON, tensor(mask[:, None], "bool") if masked else None, relu=relu)

    def call(x: Any) -> Any:
        return kernels.normalize(x, None, None, options).output

    with tf.autodiff.ForwardAccumulator(x, toward) as accumulator:
        output = call(x)
    change = accumulator.jvp(output)
    step = 1e-3

    def at(step: float) -> Any:
        y = reference.forward(X + step * np.float64(toward), mask=mask).output
        return np.maximum(y, 0) if relu else y

    np.testing.assert_allclose(change, (at(step) - at(-step)) / (2 * step), atol=1e-4)
    batches = tf.stack([x, 2 * x])
    with tf.GradientTape() as tape:
        tape.watch(batches)
        outputs = tf.vectorized_map(call, batches)
    found = tape.gradient(outputs, batches, tf.stack([toward, toward]))
    upstream = np.float64(toward) * (reference.forward(X, mask=mask).output > 0 if relu else 1)
    assert error(array(found[0]), reference.backward(upstream, X, mask=mask).x) < 1e-5


@pytest.mark.long
@on_tensorflow
def test_a_saved_training_step_loads_where_the_layer_is_imported(tmp_path: Any) -> None:
    import tensorflow as tf

    made = layer(momentum=0.0)

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32)])
        def gradient(self, x: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = made(x, training=True) ** 3
            return tape.gradient(y, x)

    module = Module()
    module.variables_of_layer = [v.value for v in made.variables]
    tf.saved_model.save(module, str(tmp_path))
    program = (
        "import sys, tensorflow as tf; from truenorm import BatchNormalization; "
        "module = tf.saved_model.load(sys.argv[1]); print(module.gradient(tf.ones((4, 3))).shape)"
    )
    assert "(4, 3)" in output_of(program, tmp_path)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_stateless_step_leaves_the_variables_alone(momentum: float | None) -> None:
    made = layer(momentum=momentum)
    before = [array(v).copy() for v in made.variables]
    values = [tensor(v.copy()) for v in before]
    output, moved = made.stateless_call(values[:2], values[2:], tensor(X), training=True)
    assert error(array(output), reference.forward(X).output) < 1e-6
    wanted = 0.1 * X.mean(0) if momentum else X.mean(0)
    np.testing.assert_allclose(array(moved[0]), wanted, rtol=1e-5)
    for old, *same in zip(before, values, made.variables, strict=True):
        for value in same:
            np.testing.assert_array_equal(array(value), old)


@on_torch
def test_a_backward_pass_that_needs_statistics_of_before_is_refused() -> None:
    import torch

    made = layer()
    kept = (torch.ones(3, requires_grad=True) * made.moving_mean.value).sum()
    made(torch.tensor(X), training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@on_torch
def test_a_checkpoint_takes_one_step() -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    made, x = layer(momentum=0.9), torch.tensor(X, requires_grad=True)
    output: Any = checkpoint(lambda x: made(x, training=True), x, use_reentrant=False)
    output.pow(3).sum().backward()
    np.testing.assert_allclose(array(made.moving_mean), 0.1 * X.mean(0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 0, 3), (4, 0), (0, 3)])
@pytest.mark.parametrize("ghosts", [None, 4])
def test_nothing_to_normalise(shape: tuple[int, ...], ghosts: int | None) -> None:
    made = BatchNormalization(virtual_batch_size=ghosts)
    made.build(shape)
    x = tensor(np.zeros(shape))
    assert tuple(made(x, training=True).shape) == shape
    assert (array(made.moving_mean) == 0).all()
    bare, _ = gradients(
        lambda x: kernels.normalize(x, None, None, Options(-1, 1e-3)).output, [x], x
    )
    assert tuple(bare.shape) == shape


@pytest.mark.skipif(BACKEND != "jax", reason="about JAX")
def test_forward_mode_reads_nothing_that_does_not_count() -> None:
    import jax

    x, mask = X.copy(), np.arange(len(X)) < 4
    x[-1] = np.nan
    toward = RNG.normal(size=X.shape).astype("float32")

    def call(x: Any) -> Any:
        return kernels.normalize(x, None, None, Options(-1, EPSILON, mask[:, None])).output

    _, change = jax.jvp(call, (x,), (toward,))
    _, clean = jax.jvp(call, (X,), (toward,))
    np.testing.assert_allclose(array(change)[mask], array(clean)[mask], rtol=1e-5)


@on_torch
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_third_derivatives(masked: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not compiled:
        monkeypatch.setattr(library, "loaded", lambda: None)

    x = torch.tensor(RNG.normal(3, 2, (6, 3)), requires_grad=True)
    gamma = torch.tensor(RNG.uniform(0.5, 2, 3), requires_grad=True)
    mask = torch.arange(6)[:, None] < 4 if masked else None
    directions = [torch.tensor(RNG.normal(size=(6, 3))) for _ in range(2)]

    def third(normalize: Any) -> Any:
        value = normalize(x, gamma, None, Options(-1, EPSILON, mask)).output.pow(3).sum()
        for direction in directions:
            (found,) = torch.autograd.grad(value, x, create_graph=True)
            value = (found * direction).sum()
        return torch.autograd.grad(value, (x, gamma))

    for have, want in zip(third(kernels.normalize), third(composite.normalize), strict=True):
        np.testing.assert_allclose(array(have), array(want), rtol=1e-9, atol=1e-9)


@on_torch
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"activation": "relu"}, {"renorm": True}, {"momentum": None}, {"domains": 2}),
        *({"virtual_batch_size": 2}, {"synchronized": True}),
        *({"freeze": "affine"}, {"freeze": "statistics"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_an_input_without_numbers(options: dict[str, Any], training: bool) -> None:
    """On the meta device: only shapes; the statistics stay what they were."""
    import torch

    made = layer(**options)
    made(torch.tensor(X), training=training)  # in use already
    before = [array(weight) for weight in made.non_trainable_variables]
    output = made(torch.empty(4, 3, device="meta"), training=training)
    assert (output.shape, output.dtype) == ((4, 3), torch.float32)
    for weight, was in zip(made.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(array(weight), was)


@on_torch
@pytest.mark.parametrize("training", [False, True])
def test_an_addend_on_another_device(training: bool) -> None:
    import torch

    made, x = layer(), torch.tensor(X)
    plain = made(x, training=training)
    output = made(x, training=training, add=torch.empty(X.shape, device="meta"))
    np.testing.assert_array_equal(array(output.detach()), array(plain.detach()))


CONSTANTS = {
    "jax": ("kernel", "composite", "without the library"),
    "tensorflow": ("kernel", "composite", "without the library", "by XLA"),
    "torch": ("kernel", "composite", "without the library", "of a GPU"),
}


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("kind", CONSTANTS[BACKEND])
def test_a_constant_whose_sum_is_beyond_float32(
    kind: str, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "without the library":
        monkeypatch.setattr(library, "loaded", lambda: None)
        if BACKEND == "jax":
            monkeypatch.setattr("truenorm._kernels.jax.native.takes", lambda _: False)
    if kind == "of a GPU":
        folder = "truenorm._kernels.torch"
        triton = importlib.import_module(f"{folder}.triton_passes")
        monkeypatch.setattr(f"{folder}.passes._passes", lambda _: triton)
    x = np.full((20, 6, 7, 6), 3e38, "float32")
    np.moveaxis(x, axis, -1)[..., 1::2] = [2.0, -3e38, 1e38]
    run = composite.normalize if kind == "composite" else kernels.normalize
    if kind == "by XLA":
        import tensorflow as tf

        run = tf.function(kernels.normalize, jit_compile=True)
    with np.errstate(over="ignore"):  # of Triton's interpreter
        batch = run(tensor(x), None, None, Options(axis=axis, epsilon=EPSILON))
    assert (array(batch.output) == 0).all()
    np.testing.assert_allclose(array(batch.mean), reference.forward(x, axis=axis).mean, 1e-6)
    assert (array(batch.variance) == 0).all()


@on_torch
def test_a_layer_without_numbers() -> None:
    """Its weights are on the meta device, as the input or elsewhere."""
    import torch

    with keras.device("meta"):
        made = layer()
        for x in (torch.tensor(X), torch.empty(X.shape, device="meta")):
            for training in (False, True):
                output = made(x, training=training)
                assert output.is_meta
                assert output.shape == X.shape
