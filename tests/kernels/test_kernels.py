"""Each backend's kernel and the composite: the reference's numbers, to the second derivative."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import product
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from fresh_process import output_of
from layer_cases import CASES, EPSILON, EVERY_KIND, Case, array, error, gradients, precision, tensor

from truenorm import BatchNormalization
from truenorm import _kernels as kernels
from truenorm._kernels import composite, library, reference
from truenorm._kernels.contract import Moving, Options
from truenorm._kernels.masks import aligned

BACKEND = keras.config.backend()
PASSES = importlib.import_module(
    f"truenorm._kernels.{BACKEND}.{'passes' if BACKEND == 'torch' else 'native'}"
)


def uncompiled(*arguments: Any) -> Any:
    """The backend's kernel as it is where the compiled passes could not be built."""
    with mock.patch.object(PASSES, "takes", return_value=False):
        return kernels.normalize(*arguments)


@contextlib.contextmanager
def triton() -> Iterator[None]:
    """The passes of a GPU: on a processor Triton interprets them (see conftest.py)."""
    passes = importlib.import_module("truenorm._kernels.torch.triton_passes")
    with mock.patch.object(PASSES, "_passes", return_value=passes):
        yield


def on_gpu(*arguments: Any) -> Any:
    with triton():
        return kernels.normalize(*arguments)


KERNELS = {
    "composite": composite.normalize,
    "selected": kernels.normalize,
    "uncompiled": uncompiled,
}
if BACKEND == "torch" and find_spec("triton") is not None:
    KERNELS["triton"] = on_gpu
# Units in the last place, relative to the largest magnitude of the result.
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
EASY = [c for c in CASES if c.mean == 0.5]


def marked(steps: Iterable[tuple[Any, ...]], few: Iterable[Case]) -> list[Any]:
    """Steps of a kernel with a case: of kernels that users do not get, most cases are costly."""
    return [
        pytest.param(
            *(name, case, *how),
            marks=[] if name == "selected" or case in few else [pytest.mark.costly],
            id="-".join(map(str, (name, case, *how))),
        )
        for name, case, *how in steps
    ]


@pytest.fixture(params=KERNELS)
def normalize(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return KERNELS[request.param]


def arguments(case: Case) -> tuple[Any, list[Any], Options]:
    drawn = case.draw()
    wide = "float64" if case.dtype == "float64" else "float32"
    tensors = [
        tensor(drawn.x, case.dtype),
        *(tensor(v, wide) for v in (drawn.gamma, drawn.beta) if v is not None),
    ]
    mask = tensor(drawn.mask, "bool")
    mask = None if mask is None else aligned(mask, tensors[0], case.axis)
    return drawn, tensors, Options(case.axis, EPSILON, mask)


def oracle(case: Case, drawn: Any) -> dict[str, Any]:
    """The same options as the reference takes them."""
    return {"axis": case.axis, "epsilon": EPSILON, "mask": drawn.mask}


def bound(normalize: Callable[..., Any], case: Case, options: Options) -> Callable[..., Any]:
    def call(x: Any, *values: Any) -> Any:
        left = list(values)
        gamma = left.pop(0) if case.scale else None
        beta = left.pop(0) if case.center else None
        return normalize(x, gamma, beta, options)

    return call


@pytest.mark.parametrize(
    ("name", "case"),
    marked(product(KERNELS, EASY), [c for c in EASY if c in EVERY_KIND or c.dtype != "float32"]),
)
def test_forward_and_backward(name: str, case: Case) -> None:
    with precision(case.dtype):
        drawn, tensors, options = arguments(case)
        call = bound(KERNELS[name], case, options)
        result = call(*tensors)
        output, found = gradients(
            lambda *a: call(*a).output, tensors, tensor(drawn.gradient, case.dtype)
        )
        known = oracle(case, drawn)
        forward = reference.forward(drawn.x, drawn.gamma, drawn.beta, **known)
        backward = reference.backward(drawn.gradient, drawn.x, drawn.gamma, **known)
        assert keras.backend.standardize_dtype(result.output.dtype) == case.dtype
        assert tuple(result.output.shape) == case.shape
        wide = EPS["float64"] if case.dtype == "float64" else EPS["float32"]
        for have in (result.output, output):  # without gradients, and with
            assert error(array(have), forward.output) < 4 * EPS[case.dtype]
        assert error(array(result.mean), forward.mean) < 8 * wide
        assert error(array(result.variance), forward.variance) < 8 * wide
        assert (keras.ops.convert_to_numpy(result.count) == forward.count).all()
        expected = [backward.x]
        expected += [backward.gamma] if case.scale else []
        expected += [backward.beta] if case.center else []
        assert error(array(found[0]), expected[0]) < 8 * EPS[case.dtype]
        for have, want in zip(found[1:], expected[1:], strict=True):
            assert error(array(have), want) < 50 * wide


@pytest.mark.skipif("triton" not in KERNELS, reason="Triton is PyTorch's, and may be missing")
@pytest.mark.parametrize("bessel", [False, True])
def test_the_passes_of_a_gpu_take_the_step(bessel: bool) -> None:
    x = np.random.default_rng(0).normal(3, 2, (300, 5)).astype("float32")
    x[7, 1] = np.nan
    layer = BatchNormalization(momentum=0.99, bessel_correction=bessel)
    layer.build(x.shape)
    passes = importlib.import_module("truenorm._kernels.torch.triton_passes")
    with triton(), mock.patch.object(passes, "forward", wraps=passes.forward) as forward:
        layer(tensor(x), training=True)
    forward.assert_called_once()
    fine = [0, 2, 3, 4]
    mean, variance = x.mean(0, dtype="float64"), x.var(0, dtype="float64", ddof=int(bessel))
    moved = array(layer.moving_mean), array(layer.moving_variance)
    assert error(moved[0][fine], reference.moving(0.0, mean, 0.99)[fine]) < 2 * EPS["float32"]
    assert error(moved[1][fine], reference.moving(1.0, variance, 0.99)[fine]) < 2 * EPS["float32"]
    assert (moved[0][1], moved[1][1]) == (0, 1)  # what is not a number is not remembered


SECOND = (
    Case((7, 3), dtype="float64"),
    Case((3, 4, 2, 3), dtype="float64"),
    Case((3, 2, 4), 1, dtype="float64"),
    Case((3, 2, 4), 1, dtype="float64", masked=True),
    Case((3, 4, 2), dtype="float64", masked=True),
    Case((3, 2, 4), 1, dtype="float64", masked="keras"),
    Case((6, 2), dtype="float64", mean=100, deviation=1),
)


@pytest.mark.parametrize(
    ("case", "relu"),
    [*((case, False) for case in SECOND), *((case, True) for case in SECOND[2:6])],
    ids=str,
)
def test_second_derivatives(normalize: Callable[..., Any], case: Case, relu: bool) -> None:
    with precision("float64"):
        drawn, (x, gamma, beta), options = arguments(case)
        call = bound(normalize, case, options._replace(relu=relu))
        rng = np.random.default_rng(3)
        directions = [rng.normal(size=s.shape) for s in (drawn.x, drawn.gamma, drawn.beta)]

        def first(x: Any, gamma: Any, gradient: Any) -> Any:
            _, found = gradients(lambda *a: call(*a).output, (x, gamma, beta), gradient)
            return sum(
                keras.ops.sum(f * tensor(d, "float64"))
                for f, d in zip(found, directions, strict=True)
            )

        one = tensor(1.0, "float64")
        at = (x, gamma, tensor(drawn.gradient, "float64"))
        _, second = gradients(first, at, one)

        known = oracle(case, drawn)

        def truth(x: Any, gamma: Any, gradient: Any) -> float:
            if relu:
                positive = reference.forward(x, gamma, drawn.beta, **known).output > 0
                gradient = gradient * positive
            found = reference.backward(gradient, x, gamma, **known)
            return float(
                sum(
                    (f * d).sum()
                    for f, d in zip((found.x, found.gamma, found.beta), directions, strict=True)
                )
            )

        origin = (drawn.x, drawn.gamma, drawn.gradient)
        for which, have in enumerate(second):
            toward = rng.normal(size=origin[which].shape)

            def moved(step: float, which: int = which, toward: Any = toward) -> float:
                values = list(origin)
                values[which] = values[which] + step * toward
                return truth(*values)

            expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
            assert float((array(have) * toward).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "case", [Case((64, 5)), *(Case((6, 7, 5), 1, masked=m) for m in (True, "keras"))], ids=str
)
def test_relu(normalize: Callable[..., Any], case: Case) -> None:
    drawn, tensors, options = arguments(case)
    call = bound(normalize, case, options._replace(relu=True))
    output, found = gradients(lambda *a: call(*a).output, tensors, tensor(drawn.gradient))
    known = oracle(case, drawn)
    forward = reference.forward(drawn.x, drawn.gamma, drawn.beta, **known)
    passed = drawn.gradient * (forward.output > 0)
    backward = reference.backward(passed, drawn.x, drawn.gamma, **known)
    assert error(array(output), np.maximum(forward.output, 0)) < 4 * EPS["float32"]
    for have, want in zip(found, (backward.x, backward.gamma, backward.beta), strict=True):
        assert error(array(have), want) < 16 * EPS["float32"]


@pytest.mark.parametrize("axis", [-1, 1])
def test_one_value_per_channel_gives_beta(normalize: Callable[..., Any], axis: int) -> None:
    x = tensor(np.full((1, 3) if axis == -1 else (1, 3, 1), 1000.1))
    gamma, beta = tensor([2.0, 3.0, 4.0]), tensor([5.0, 6.0, 7.0])
    result = normalize(x, gamma, beta, Options(axis, 1e-3))
    assert array(result.output).ravel().tolist() == [5.0, 6.0, 7.0]
    assert array(result.variance).tolist() == [0.0, 0.0, 0.0]
    assert float(result.count) == 1


def test_empty_batch(normalize: Callable[..., Any]) -> None:
    result = normalize(tensor(np.zeros((0, 4, 3))), None, None, Options(-1, 1e-3))
    assert tuple(result.output.shape) == (0, 4, 3)
    assert float(result.count) == 0
    assert array(result.mean).tolist() == [0.0, 0.0, 0.0]
    assert array(result.variance).tolist() == [0.0, 0.0, 0.0]


def test_nothing_valid_normalises_with_the_fallback(normalize: Callable[..., Any]) -> None:
    x = np.array([[1.0, 5.0], [3.0, 7.0]])
    moving = Moving(tensor([1.0, 5.0]), tensor([4.0, 1.0]))
    nothing = tensor([[False], [False]], "bool")
    result = normalize(tensor(x), None, None, Options(-1, 0.0, nothing, moving))
    assert array(result.count) == 0
    assert array(result.output).tolist() == [[0.0, 0.0], [1.0, 2.0]]


def test_what_nothing_valid_normalises_does_not_reach_the_statistics(
    normalize: Callable[..., Any],
) -> None:
    x, gradient = (np.random.default_rng(k).normal(size=(6, 2)) for k in (1, 2))
    moving = Moving(tensor([1.0, 5.0]), tensor([4.0, 1.0]))
    options = Options(-1, 0.0, tensor(np.zeros((6, 1)), "bool"), moving)
    at = [tensor(values) for values in (x, [2.0, 3.0], [0.0, 1.0])]
    _, found = gradients(lambda *a: normalize(*a, options).output, at, tensor(gradient))
    assert error(array(found[0]), gradient * [1.0, 3.0]) < 4 * EPS["float32"]
    want = (gradient * (x - [1.0, 5.0]) / [2.0, 1.0]).sum(0)
    assert error(array(found[1]), want) < 8 * EPS["float32"]
    assert error(array(found[2]), gradient.sum(0)) < 8 * EPS["float32"]


def test_nan_stays_in_its_channel(normalize: Callable[..., Any]) -> None:
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 3))
    x[0, 0, 0, 1] = np.nan
    result = normalize(tensor(x), None, None, Options(-1, EPSILON))
    assert np.isnan(array(result.output)[..., 1]).all()
    assert np.isnan(array(result.mean)).tolist() == [False, True, False]
    expected = reference.forward(x[..., [0, 2]]).output
    assert error(array(result.output)[..., [0, 2]], expected) < 4 * EPS["float32"]


def test_the_compiled_passes_take_plain_batches() -> None:
    """They are built with the package; without them only what replaces them would be tested."""
    assert library.loaded() is not None
    taken = []

    def call(x: Any) -> Any:
        taken.append(PASSES.takes(x))
        return x * x

    gradients(call, [tensor(np.ones((2, 3)))], tensor(np.ones((2, 3))))
    assert taken[0]


@pytest.mark.skipif(keras.config.backend() != "torch", reason="orders of memory are PyTorch's")
@pytest.mark.usefixtures("where_keras_computes")
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("order", ["channels_last", "sliced", "expanded", "negated"])
def test_any_order_of_memory(order: str, axis: int) -> None:
    import torch

    rng = np.random.default_rng(0)
    x, dy = (torch.tensor(rng.normal(3, 2, (4, 6, 5, 7)).astype("float32")) for _ in range(2))
    if order == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif order == "sliced":
        x, dy = x[:, ::2], dy[:, ::2]
    elif order == "expanded":
        dy = torch.ones(()).expand(x.shape)
    else:
        x, dy = (torch.complex(torch.zeros_like(t), -t).conj().imag for t in (x, dy))
        assert x.is_neg()
    leaf = x.detach().requires_grad_()
    output = kernels.normalize(leaf, None, None, Options(axis, EPSILON)).output
    (d_x,) = torch.autograd.grad(output, leaf, dy)
    numbers, upstream = (array(t.resolve_neg()) for t in (x, dy))
    expected = reference.forward(numbers, axis=axis).output
    assert error(array(output.detach()), expected) < 4 * EPS["float32"]
    want = reference.backward(upstream, numbers, axis=axis).x
    assert np.abs(array(d_x) - want).max() < 4 * EPS["float32"] * np.abs(upstream).max()


@pytest.mark.skipif(keras.config.backend() != "torch", reason="counts bytes that autograd keeps")
@pytest.mark.usefixtures("where_keras_computes")
def test_backward_keeps_the_input_and_little_else() -> None:
    import torch

    x = torch.randn(8, 16, 16, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def note(saved: Any) -> Any:
        kept[saved.data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        kernels.normalize(x, torch.ones(32), torch.zeros(32), Options(-1, EPSILON))
    assert sum(kept.values()) < 1.01 * x.nbytes


@pytest.mark.costly
def test_only_the_framework_in_use_is_imported() -> None:
    program = (
        "import sys, keras; before = set(sys.modules); import truenorm._kernels; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    imported = set(output_of(program).split())
    assert "truenorm" in imported
    assert not imported & ({"jax", "tensorflow", "torch"} - {keras.config.backend()})
