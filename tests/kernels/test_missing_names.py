"""Where another version of a framework lacks a name that the kernels use, a training step is right.

These are the names without a public equivalent. They are hidden from the kernels alone: the
framework goes on using them itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from fresh_process import output_of
from layer_cases import Drawn, error, train, truth

from truenorm import BatchNormalization
from truenorm._kernels import reference

BACKEND = keras.config.backend()
NAMES = {
    "torch": (
        "passes:forward_ad._current_level",
        "passes:torch._C._len_torch_dispatch_stack",
        "passes:torch._C._are_functorch_transforms_active",
        "passes:torch._C._functorch.is_legacy_batchedtensor",
        "passes:torch.autograd.graph.increment_version",
        "kernel:torch.native_batch_norm",
        "kernel:aten.native_batch_norm_backward",
        "kernel:aten.threshold_backward",
        "kernel:torch.batch_norm_update_stats",
    ),
    "tensorflow": (
        "native:control_flow_util.GraphOrParentsInXlaContext",
        "portable:tf.Graph._functions",
        "portable:tf.Graph._add_function_recursive",
    ),
    "jax": ("native:jax.ffi", "native:mlir.lower_fun", "native:mlir.register_lowering"),
}[BACKEND]


class Lacking:
    """A module, without some of its names."""

    def __init__(self, module: Any, names: Iterable[str]) -> None:
        self._module, self._names = module, tuple(names)

    def __getattr__(self, name: str) -> Any:
        inner = [n.partition(".")[2] for n in self._names if n.partition(".")[0] == name]
        if "" in inner:
            raise AttributeError(f"{self._module} has no {name}")
        value = getattr(self._module, name)
        return Lacking(value, inner) if inner else value

    def __call__(self, *arguments: Any) -> Any:
        return Lacking(self._module(*arguments), self._names)


def hidden(monkeypatch: pytest.MonkeyPatch, names: Iterable[str]) -> None:
    """Hide names from the kernels."""
    by_module: dict[tuple[str, str], list[str]] = {}
    for name in names:
        ours, _, path = name.partition(":")
        module, _, rest = path.partition(".")
        by_module.setdefault((ours, module), []).append(rest)
    for (ours, module), paths in by_module.items():
        kernel = importlib.import_module(f"truenorm._kernels.{BACKEND}.{ours}")
        monkeypatch.setattr(kernel, module, Lacking(getattr(kernel, module), paths))
        if hasattr(kernel, "_registered"):  # It would remember the answer.
            monkeypatch.setattr(kernel, "_registered", cache(kernel._registered.__wrapped__))
    if BACKEND == "tensorflow":
        kernel = importlib.import_module("truenorm._kernels.tensorflow.kernel")
        monkeypatch.setattr(kernel, "_kernel", cache(kernel._kernel.__wrapped__))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("names", [*((name,) for name in NAMES), NAMES], ids=str)
def test_a_training_step(
    names: tuple[str, ...], relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden(monkeypatch, names)
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(3, 2, (8, 4, 3)).astype("float32").astype("float64") for _ in range(2))
    gamma, beta = (rng.uniform(0.5, 2, 3).astype("float32").astype("float64") for _ in range(2))
    for mask in (None, rng.random((8, 4)) < 0.6):
        drawn = Drawn(x, gamma, beta, dy, mask)
        layer = BatchNormalization(activation="relu" if relu else None)
        found = train(layer, drawn, "float32")
        true = truth(drawn, -1, relu=relu)
        for name in ("output", "x", "gamma", "beta", "moving_mean", "moving_variance"):
            assert error(getattr(found, name), getattr(true, name)) < 1e-6, name


@pytest.mark.skipif(BACKEND != "tensorflow", reason="others have no graphs of their own")
@pytest.mark.parametrize("names", [*((name,) for name in NAMES), NAMES], ids=str)
@pytest.mark.parametrize("axis", [-1, 1])
def test_a_graph(names: tuple[str, ...], axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    hidden(monkeypatch, names)
    x, dy = (tf.random.normal((8, 4, 3), 3, 2) for _ in range(2))
    layer: Any = BatchNormalization(axis=axis, momentum=0.0)
    layer.build(x.shape)

    @tf.function
    def step(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, output_gradients=dy)

    y, d_x = step(x, dy)
    true = reference.forward(x.numpy(), axis=axis)
    assert error(y.numpy(), true.output) < 1e-6
    assert error(layer.moving_mean.numpy(), true.mean) < 1e-6
    assert error(d_x.numpy(), reference.backward(dy.numpy(), x.numpy(), axis=axis).x) < 1e-6


@pytest.mark.parametrize("names", [*((name,) for name in NAMES), NAMES], ids=str)
def test_inference(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden(monkeypatch, names)
    x = np.random.default_rng(0).normal(3, 2, (8, 3)).astype("float32")
    output = keras.ops.convert_to_numpy(BatchNormalization(trainable=False)(x))
    np.testing.assert_allclose(output, x / np.sqrt(1.001), rtol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="without the compiled passes PyTorch has its own")
@pytest.mark.parametrize("names", [n for n in NAMES if n.startswith("kernel")])
def test_nor_are_the_compiled_passes_there(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = importlib.import_module("truenorm._kernels.torch.passes")
    with mock.patch.object(passes, "takes", return_value=False):
        test_a_training_step((names,), True, monkeypatch)
        test_inference((names,), monkeypatch)


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "tensorflow", reason="about modules of TensorFlow")
def test_modules_are_missing() -> None:
    program = (
        "import sys; sys.path[:0] = ['tests', 'tests/kernels']\n"
        "from tensorflow.python import ops\n"
        "from tensorflow.python.ops import control_flow_util\n"
        "del ops.control_flow_util\n"
        "sys.modules['tensorflow.python.ops.control_flow_util'] = None\n"
        "from truenorm._kernels.tensorflow import native\n"
        "assert native.control_flow_util is None\n"
        "import pytest, test_missing_names as test\n"
        "test.test_a_training_step((), True, pytest.MonkeyPatch())\n"
    )
    output_of(program)


@pytest.mark.skipif(BACKEND != "jax", reason="about JAX")
def test_float64_by_its_name_before_jax_0_8(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from truenorm._kernels import sums

    monkeypatch.setattr(jax.experimental, "enable_x64", jax.enable_x64, raising=False)
    hidden(monkeypatch, ["sums:jax.enable_x64"])
    _, found = sums.batch_sums(keras.ops.ones((8, 3)), axis=-1)
    assert found.dtype == "float64"
