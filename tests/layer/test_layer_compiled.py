"""The layer inside compilers and exporters: same numbers, at inference with stock operations."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from layer_cases import array, error, tensor

from truenorm import BatchNormalization, domain
from truenorm._kernels import reference

BACKEND = keras.config.backend()
pytestmark = pytest.mark.usefixtures("where_keras_computes")
RNG = np.random.default_rng(2)
X = RNG.normal(3, 2, (8, 3, 5)).astype("float32")
GRADIENT = RNG.normal(size=X.shape).astype("float32")

Step = tuple[Any, Any, Any]
"""Output, gradient of ``X`` and moving mean of ``new_layer`` after one training step with ``X``."""


def new_layer(**options: Any) -> Any:
    layer = BatchNormalization(**{"momentum": 0.0, "activation": "relu", **options})
    layer.build(X.shape)
    return layer


def torch_step(wrapped: Callable[[Any], Callable[..., Any]]) -> Step:
    import torch

    layer = new_layer()
    x = torch.tensor(X, requires_grad=True)
    output = wrapped(layer)(x)
    output.backward(torch.tensor(GRADIENT))
    return output.detach(), x.grad, layer.moving_mean


def in_torch_compile() -> Step:
    import torch

    def wrapped(layer: Any) -> Any:
        call = lambda x: layer(x, training=True)  # noqa: E731
        return torch.compile(call, backend="aot_eager", fullgraph=True)

    return torch_step(wrapped)


def in_torch_checkpoint() -> Step:
    from torch.utils.checkpoint import checkpoint

    return torch_step(
        lambda layer: (
            lambda x: checkpoint(lambda x: layer(x, training=True), x, use_reentrant=False)
        )
    )


def in_xla(recompute: bool = False) -> Step:
    import tensorflow as tf

    layer = new_layer()

    @tf.function(jit_compile=True)
    def step(x: Any) -> Any:
        call = lambda x: layer(x, training=True)  # noqa: E731
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = (tf.recompute_grad(call) if recompute else call)(x)
        return output, tape.gradient(output, x, tf.constant(GRADIENT))

    return *step(tf.constant(X)), layer.moving_mean


def in_jit(recompute: bool = False) -> Step:
    import jax

    layer = new_layer()
    trainable, moving = (
        [v.value for v in variables]
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    )

    def call(x: Any) -> Any:
        return layer.stateless_call(trainable, moving, x, training=True)

    @jax.jit
    def step(x: Any, gradient: Any) -> Any:
        function = jax.checkpoint(call) if recompute else call
        output, pull, moved = jax.vjp(function, x, has_aux=True)
        return output, pull(gradient)[0], moved[0]

    return step(X, GRADIENT)


STEPS: dict[str, list[Callable[[], Step]]] = {
    "torch": [in_torch_compile, in_torch_checkpoint],
    "tensorflow": [in_xla, partial(in_xla, recompute=True)],
    "jax": [in_jit, partial(in_jit, recompute=True)],
}


@pytest.mark.parametrize("step", STEPS[BACKEND])
def test_one_training_step(step: Callable[[], Step]) -> None:
    output, gradient, moving_mean = map(array, step())
    forward = reference.forward(X)
    backward = reference.backward(GRADIENT * (forward.output > 0), X)
    assert error(output, np.maximum(forward.output, 0)) < 1e-6
    assert error(gradient, backward.x) < 1e-6
    assert error(moving_mean, forward.mean) < 1e-6


if BACKEND == "tensorflow":

    @pytest.mark.parametrize("share", [0.6, 0.0])
    def test_a_masked_step_of_xla(share: float) -> None:
        import tensorflow as tf

        mask = np.random.default_rng(5).random(X.shape[:2]) < share
        layer = new_layer(activation=None)

        @tf.function(jit_compile=True)
        def step(x: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                output = layer(x, training=True, mask=tf.constant(mask))
            return output, tape.gradient(output, x, tf.constant(GRADIENT))

        output, gradient = map(array, step(tf.constant(X)))
        if not share:  # the moving statistics normalise, and stay: 0 and 1
            assert error(output, X / np.sqrt(1 + layer.epsilon)) < 1e-6
            assert error(gradient, GRADIENT / np.sqrt(1 + layer.epsilon)) < 1e-6
            assert set(array(layer.moving_mean)) == {0.0}
            assert set(array(layer.moving_variance)) == {1.0}
            return
        forward = reference.forward(X, mask=mask)
        assert error(output, forward.output) < 1e-6
        assert error(gradient, reference.backward(GRADIENT, X, mask=mask).x) < 1e-6
        assert error(array(layer.moving_mean), forward.mean) < 1e-6
        assert error(array(layer.moving_variance), forward.variance) < 1e-6


if BACKEND == "torch":
    CHANNELS_LAST = lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)  # noqa: E731

    @pytest.mark.parametrize(
        ("options", "how"),
        [
            ({}, "training"),
            ({}, "masked"),
            ({}, "inference"),
            ({"momentum": None}, "training"),
            ({"renorm": True}, "training"),
            ({"virtual_batch_size": 4}, "training"),
            ({"synchronized": True}, "training"),
            ({"accumulation_steps": 2}, "training"),
            ({"domains": 2}, "training"),
            ({"domains": 2}, "inference"),
            ({"freeze": "statistics"}, "training"),
        ],
        ids=str,
    )
    def test_torch_compile_makes_one_graph(options: dict[str, Any], how: str) -> None:
        import torch

        mask = torch.tensor(np.arange(24).reshape(8, 3) % 5 > 0) if how == "masked" else None
        layer, eager = (
            partial(new_layer(**options), training=how != "inference", mask=mask) for _ in range(2)
        )
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)  # a break is an error
        assert error(array(compiled(torch.tensor(X))), array(eager(torch.tensor(X)))) < 1e-6

    @contextlib.contextmanager
    def as_on_a_gpu() -> Iterator[None]:
        """Triton's passes, by its interpreter where there is no GPU."""
        pytest.importorskip("triton")
        passes = importlib.import_module("truenorm._kernels.torch.passes")
        triton = importlib.import_module("truenorm._kernels.torch.triton_passes")
        with mock.patch.object(passes, "_passes", return_value=triton):
            yield

    @pytest.mark.parametrize("added", [False, True], ids=["", "a sum inside"])
    @pytest.mark.parametrize(
        ("laid_out", "relu", "dtype", "on"),
        [
            (lambda x: x, False, "float32", contextlib.nullcontext),
            (lambda x: x, True, "float32", as_on_a_gpu),
            (CHANNELS_LAST, True, "bfloat16", contextlib.nullcontext),
            (CHANNELS_LAST, False, "bfloat16", as_on_a_gpu),
            (lambda x: x.repeat_interleave(2, 0)[::2], True, "float64", contextlib.nullcontext),
        ],
        ids=["channels first", "on a GPU", "channels last", "last, on a GPU", "with gaps"],
    )
    def test_torch_compile_holds_the_passes_as_one_node_each_way(
        laid_out: Callable[[Any], Any], relu: bool, dtype: str, on: Any, added: bool
    ) -> None:
        import torch
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        if dtype == "float64" and torch.cuda.is_available():
            pytest.skip("a GPU's passes do not take it")
        nodes: list[str] = []

        def noted(graph: Any, _: Any) -> Any:
            nodes.extend(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        kind = "mixed_bfloat16" if dtype == "bfloat16" else dtype
        activation = "relu" if relu else None
        made = BatchNormalization(axis=1, momentum=0.5, activation=activation, dtype=kind)
        made(np.ones((2, 4, 3, 5)))  # Keras's state of before any call would be another graph's.
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, add: made(x, add=add, training=True) if added else made(x, training=True),
            backend=aot_autograd(fw_compiler=noted, bw_compiler=noted),
            fullgraph=True,
            dynamic=True,
        )
        within = 0.02 if dtype == "bfloat16" else 1e-6
        for samples in (6, 8):  # one graph for both
            made.moving_mean.assign([0.0] * 4)
            at, beside, toward = (
                torch.tensor(RNG.normal(2, 3, (samples, 4, 3, 5))).to(getattr(torch, dtype))
                for _ in range(3)
            )
            at = laid_out(at).requires_grad_()
            beside.requires_grad_()
            with on():
                output = compiled(at, beside)
                output.backward(toward)
            x, add, dy, y = (array(t.detach().double()) for t in (at, beside, toward, output))
            truth = reference.forward(x, axis=1)
            expected = truth.output + add if added else truth.output
            dy = dy * (y > 0) if relu else dy
            assert error(y, np.maximum(expected, 0) if relu else expected) < within
            backward = reference.backward(dy, x, axis=1)
            assert error(array(at.grad.double()), backward.x) < within
            assert not added or error(array(beside.grad.double()), dy) < within
            assert error(array(made.moving_mean), truth.mean / 2) < within
        ours = [node for node in nodes if node.startswith("truenorm")]
        assert ours == ["truenorm.forward.default", "truenorm.backward.default"]

    def test_torch_compile_of_no_channel() -> None:
        import torch

        made = BatchNormalization()
        made.build((8, 0))
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        assert compiled(torch.zeros(8, 0), training=True).shape == (8, 0)

    def test_torch_compile_in_forward_mode() -> None:
        import torch
        from torch.autograd import forward_ad

        layer = new_layer(activation=None)
        x, toward = torch.tensor(X), torch.tensor(GRADIENT)
        found: list[np.ndarray] = []
        for run in (layer, torch.compile(layer, backend="eager", fullgraph=True)):
            torch.compiler.reset()
            with forward_ad.dual_level():
                output = run(forward_ad.make_dual(x, toward), training=True)
                found.append(array(forward_ad.unpack_dual(output).tangent.detach()))
        np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)

    def test_torch_compile_for_second_derivatives() -> None:
        import torch

        layer = new_layer()
        x = torch.tensor(X, dtype=torch.float32, requires_grad=True)
        weights = torch.tensor(GRADIENT, dtype=torch.float32)
        found = []
        for run in (layer, torch.compile(layer, backend="eager", fullgraph=True)):
            torch.compiler.reset()
            (first,) = torch.autograd.grad(
                (run(x, training=True) * weights).sum(), x, create_graph=True
            )
            (second,) = torch.autograd.grad(first.square().sum(), x)
            found.append(array(second))
        assert error(*found) < 1e-5

    def test_torch_compile_reads_the_domain() -> None:
        import torch

        layer = new_layer(domains=2)
        layer.moving_mean.assign([[0.0] * 5, [3.0] * 5])
        torch.compiler.reset()
        compiled = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)
        for index in (1, 0):
            with domain(index):
                assert error(array(compiled(torch.tensor(X))), array(layer(torch.tensor(X)))) < 1e-6


if BACKEND == "jax":

    def test_forward_mode_needs_a_mask() -> None:
        import jax

        layer = BatchNormalization()
        toward = RNG.normal(size=X.shape).astype("float32")
        mask = tensor(np.ones(X.shape[:-1]), "bool")
        _, found = jax.jvp(lambda x: layer(x, training=True, mask=mask), (X,), (toward,))
        ahead, behind = (
            reference.forward(np.float64(X) + step * toward).output for step in (1e-6, -1e-6)
        )
        assert error(array(found), (ahead - behind) / 2e-6) < 1e-5
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda x: layer(x, training=True), (X,), (toward,))


# --- exported for inference --------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, Any]:
    """A model with every option that could show in an inference graph, an input, its output."""
    network = keras.Sequential(
        [
            keras.Input((5,)),
            BatchNormalization(activation="relu", momentum=None, virtual_batch_size=4),
            keras.layers.Dense(3),
            BatchNormalization(renorm=True, synchronized=True),
        ]
    )
    x = RNG.normal(3, 2, (8, 5)).astype("float32")
    network.compile("sgd", "mse")
    network.fit(x, np.zeros((8, 3)), verbose=0)
    return network, x, network.predict(x, verbose=0)


def torch_export(network: Any, x: Any, folder: pathlib.Path) -> Any:  # noqa: ARG001
    import torch

    program = torch.export.export(network.eval(), (torch.tensor(x),))
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert names
    assert all(name.startswith("aten.") and "batch_norm" not in name for name in names)
    return program.module()(torch.tensor(x)).detach()


def onnx_export(network: Any, x: Any, folder: pathlib.Path) -> Any:
    import onnx
    import onnxruntime

    path = str(folder / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's tracer, about Keras's own code
        network.export(path, format="onnx", verbose=False)
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def saved_model(network: Any, x: Any, folder: pathlib.Path) -> Any:
    network.export(str(folder), verbose=False)
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder))
    graph = loaded.signatures["serving_default"].graph.as_graph_def()
    used = {n.op for f in graph.library.function for n in f.node_def}
    if BACKEND == "tensorflow":
        arithmetic = {"AddV2", "Sub", "Mul", "Rsqrt", "Relu", "MatMul", "BiasAdd"}
        plumbing = {"Identity", "Const", "NoOp", "ReadVariableOp", "Reshape", "Shape", "Cast"}
        plumbing |= {"Pack", "StridedSlice", "StatefulPartitionedCall"}
        assert used <= arithmetic | plumbing
    return loaded.serve(x)


EXPORTS: dict[str, list[Callable[..., Any]]] = {
    "torch": [torch_export, onnx_export],
    "tensorflow": [saved_model],
    "jax": [saved_model],
}


@pytest.mark.other_packages
@pytest.mark.parametrize("export", EXPORTS[BACKEND])
def test_what_is_exported_gives_what_predict_gives(
    trained: Any, tmp_path: pathlib.Path, export: Callable[..., Any]
) -> None:
    network, x, expected = trained
    np.testing.assert_allclose(np.asarray(export(network, x, tmp_path)), expected, atol=1e-5)


@pytest.mark.other_packages
@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch's exporters see the composite's operations")
def test_a_call_in_training_mode_is_exported_without_the_compiled_passes(
    tmp_path: pathlib.Path,
) -> None:
    inputs = keras.Input((5,))
    network = keras.Model(inputs, BatchNormalization(momentum=0.0)(inputs, training=True))
    network.export(str(tmp_path), verbose=False)
    import tensorflow as tf

    loaded = tf.saved_model.load(str(tmp_path))
    graph = loaded.signatures["serving_default"].graph.as_graph_def()
    used = {n.op for part in (graph, *graph.library.function) for n in node_defs(part)}
    assert not [name for name in used if "ruenorm" in name]
    x = RNG.normal(3, 2, (8, 5)).astype("float32")
    expected = reference.forward(x).output
    np.testing.assert_allclose(np.asarray(loaded.serve(x)), expected, atol=1e-5)


@pytest.mark.long
def test_training_writes_nothing_of_ours_to_standard_error() -> None:
    """XLA and TensorFlow log what they dislike in an operation there, and go on."""
    program = (
        "import keras, numpy as np; from truenorm import BatchNormalization; "
        "layers = [keras.Input((3,)), BatchNormalization(), keras.layers.Dense(1)]; "
        "model = keras.Sequential(layers); "
        "model.compile('sgd', 'mse'); "
        "model.fit(np.ones((8, 3)), np.zeros((8, 1)), verbose=0, batch_size=4)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "tn_" not in found.stderr.lower()
    assert "truenorm" not in found.stderr.lower()


def node_defs(part: Any) -> Any:
    """The nodes of a graph, or of a function of it."""
    return part.node if hasattr(part, "node") else part.node_def
