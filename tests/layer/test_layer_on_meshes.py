"""JAX: arrays that lie over devices by their type, and programs that are mapped over several axes.

What needs several devices runs in a process of its own, with four of them: one for all tests.
"""

from __future__ import annotations

import json
import os
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from fresh_process import output_of
from layer_cases import EPSILON, error

from truenorm import BatchNormalization
from truenorm._kernels import reference

pytestmark = pytest.mark.skipif(keras.config.backend() != "jax", reason="meshes of JAX")

START = """
import json
import jax, keras, numpy as np
import truenorm as tn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

def data(shape):
    return np.random.default_rng(0).normal(3, 2, (2, *shape)).astype("float32")

def step_of(layer, shape, mask=None):
    layer.build(shape)
    moving = [v.value for v in layer.non_trainable_variables]
    def step(x, weights, gradient):
        def call(x, weights):
            return layer.stateless_call(weights, moving, x, training=True, mask=mask)
        y, pull, moved = jax.vjp(call, x, weights, has_aux=True)
        return y, *pull(gradient), moved
    return step, [v.value for v in layer.trainable_variables]
"""


EXPLICIT = """
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
shape, found = (4, 4, 2, 4), {}
mask = np.arange(32).reshape(4, 4, 2) % 3 > 0
for axis in (-1, 1):
    for name, spec in {
        "rows": P("a"), "both": P(("a", "b")), "inside": P("a", None, "b"), "second": P(None, "a"),
        "last": P("a", None, None, "b"),
    }.items():
        for masked in (False, True):
            layer = tn.BatchNormalization(axis=axis, momentum=0.0, synchronized=True)
            step, weights = step_of(layer, shape, mask if masked else None)
            x, gradient = jax.device_put(tuple(data(shape)), NamedSharding(mesh, spec))
            y, d_x, d_weights, moved = jax.jit(step)(x, weights, gradient)
            assert len(y.sharding.device_set) == 4
            found[f"{axis} {name} {masked}"] = [
                np.asarray(a).tolist() for a in (y, d_x, *d_weights, *moved)
            ]
        layer = tn.BatchNormalization(axis=axis, momentum=0.0, virtual_batch_size=2)
        step, weights = step_of(layer, shape)
        y, d_x, *_ = jax.jit(step)(x, weights, gradient)
        found[f"{axis} {name} ghosts"] = [np.asarray(a).tolist() for a in (y, d_x)]
with jax.set_mesh(mesh):  # one operation after the other
    layer = tn.BatchNormalization(momentum=0.0)
    step, weights = step_of(layer, shape)
    x, gradient = jax.device_put(tuple(data(shape)), NamedSharding(mesh, P("a")))
    y, d_x, d_weights, moved = step(x, weights, gradient)
found["-1 eager False"] = [np.asarray(a).tolist() for a in (y, d_x, *d_weights, *moved)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def printed() -> list[Any]:
    """What each program prints."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    with mock.patch.dict(os.environ, XLA_FLAGS=flags):
        return [
            json.loads(line) for line in output_of(START + EXPLICIT + DIVIDED + AXES).split("\n")
        ]


def test_a_mesh_of_explicit_axes_is_one_batch_or_its_ghosts(printed: list[Any]) -> None:
    found = printed[0]
    assert len(found) == 31
    for name, given in found.items():
        axis, _, masked = name.split()
        whole = one_device if masked != "ghosts" else two_ghosts
        expected = whole((4, 4, 2, 4), int(axis), masked=masked == "True")
        for value, wanted in zip(given, expected, strict=True):
            assert error(np.array(value), wanted) < 1e-6, name


def two_ghosts(shape: tuple[int, ...], axis: int, *, masked: bool) -> list[Any]:
    """Output and gradient of x, where every second sample is of one ghost batch."""
    x, gradient = np.random.default_rng(0).normal(3, 2, (2, *shape)).astype("float32").astype(float)
    assert not masked
    found = np.empty((2, *shape))
    for own in (slice(None, None, 2), slice(1, None, 2)):
        how: dict[str, Any] = {"axis": axis, "epsilon": EPSILON}
        found[0, own] = reference.forward(x[own], **how).output
        found[1, own] = reference.backward(gradient[own], x[own], np.ones(shape[axis]), **how).x
    return list(found)


def one_device(shape: tuple[int, ...], axis: int, *, masked: bool) -> list[Any]:
    """Output, gradients, mean and variance."""
    x, gradient = np.random.default_rng(0).normal(3, 2, (2, *shape)).astype("float32").astype(float)
    mask = np.arange(32).reshape(4, 4, 2) % 3 > 0 if masked else None
    how: dict[str, Any] = {"axis": axis, "epsilon": EPSILON, "mask": mask}
    batch, ones = reference.forward(x, **how), np.ones(shape[axis])
    backward = reference.backward(gradient, x, ones, **how)
    return [batch.output, backward.x, backward.gamma, backward.beta, batch.mean, batch.variance]


DIVIDED = """
import re
mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
layer = tn.BatchNormalization()
step, weights = step_of(layer, (8, 6))
x, gradient = jax.device_put(tuple(data((8, 6))), NamedSharding(mesh, P("a")))
program = jax.jit(step).lower(x, weights, gradient).compile().as_text()
print(json.dumps(sorted(set(re.findall(r"(all-\\w+)\\(|(tn_xla\\w+)", program)))))
"""


def test_compiled_passes_do_not_gather_what_lies_over_devices(printed: list[Any]) -> None:
    assert printed[1] == [["all-reduce", ""]]


AXES = """
mesh = jax.make_mesh((2, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
x, gradient = data((4, 3, 2))

def run(x, axes, **options):
    layer = tn.BatchNormalization(momentum=0.0, **options)
    step, weights = step_of(layer, (None, 3, 2))
    def mean(x, gradient):
        return step(x, weights, gradient)[3][0][None]
    rows = P(("batch", "model"))
    program = jax.shard_map(mean, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=axes,
                            check_vma=False)
    try:
        return np.asarray(jax.jit(program)(x, gradient)).tolist()
    except tn.DistributedError as error:
        return str(error)

everywhere = {"batch", "model"}
print(json.dumps({
    "batch": run(x, everywhere, synchronized="batch"),
    "both": run(x, everywhere, synchronized=("batch", "model")),
    "unnamed": run(x, everywhere, synchronized=True),
    "misspelt": run(x, everywhere, synchronized="bacth"),
    "alone": run(x, everywhere),
}))
"""


def test_of_several_axes_the_user_chooses(printed: list[Any]) -> None:
    found = printed[2]
    x = np.random.default_rng(0).normal(3, 2, (2, 4, 3, 2)).astype("float32")[0].astype(float)
    alone = x.mean(1)  # each device has one sample
    assert error(np.array(found["alone"]), alone) < 1e-6
    over_batch = np.stack([alone[[0, 2]].mean(0), alone[[1, 3]].mean(0)] * 2)
    assert error(np.array(found["batch"]), over_batch) < 1e-6
    assert error(np.array(found["both"]), np.stack([alone.mean(0)] * 4)) < 1e-6
    assert found["unnamed"] == (
        "The program of synchronized BatchNormalization is mapped over several axes. Expected: the "
        "names of those that the batch is divided over. Received: synchronized=True, and the axes "
        "'batch', 'model'. Remedy: synchronized='batch', or several: "
        "synchronized=('batch', 'model')."
    )
    assert found["misspelt"] == (
        "Synchronized BatchNormalization is told of an axis that there is not. Expected: names "
        "among 'batch', 'model'. Received: synchronized=('bacth',)."
    )


@pytest.mark.parametrize("since", ["0.9", "0.10"])
def test_an_axis_of_vmap_counts_if_it_is_named(since: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the sum that JAX 0.9 needs in the place of a gathering."""
    import jax

    if since == "0.9":
        refused = mock.Mock(side_effect=ValueError)
        monkeypatch.setattr(jax.lax, "all_gather", refused)
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 3)).astype("float32")
    layer = BatchNormalization(momentum=0.0, synchronized="part")
    layer.build((None, 3))
    weights = [[v.value for v in layer.trainable_variables],
               [v.value for v in layer.non_trainable_variables]]  # fmt: skip

    def call(x: Any) -> Any:
        return layer.stateless_call(*weights, x, training=True)

    output, (mean, _) = jax.vmap(call, axis_name="part")(x)
    forward = reference.forward(x.reshape(10, 3).astype(float), epsilon=EPSILON)
    assert error(np.asarray(output).reshape(10, 3), forward.output) < 1e-6
    assert error(np.asarray(mean), np.stack([forward.mean] * 2)) < 1e-6
