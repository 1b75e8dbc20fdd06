"""A tensor added behind the normalisation, with and without ReLU: every kernel."""

from __future__ import annotations

from itertools import product
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import EVERY_KIND, Case, array, error, gradients, precision, tensor
from test_kernels import BACKEND, EPS, KERNELS, arguments, marked, oracle

from truenorm._kernels import reference
from truenorm._kernels.contract import Options

CASES = (
    *EVERY_KIND,
    Case((4, 5, 6, 3), -1, "float16"),
    Case((4, 5, 6, 3), 1, "bfloat16"),
    Case((4, 5, 6, 3), -1, "bfloat16", masked=True),
)
FEW = CASES[1:3] + CASES[6:9] + CASES[11:]


def added(case: Case) -> Any:
    """What is added, exact in the case's dtype; no sum has a sign that is a matter of rounding."""
    drawn, values = case.draw(), np.random.default_rng(11).normal(size=case.shape)
    total = reference.forward(drawn.x, drawn.gamma, drawn.beta, **oracle(case, drawn)).output
    values = np.where(np.abs(total + values) < 0.1, values + 0.3, values)
    return array(tensor(values, case.dtype))


def bound(kernel: Any, case: Case, options: Options) -> Any:
    def call(x: Any, *values: Any) -> Any:
        *left, add = values
        gamma = left.pop(0) if case.scale else None
        beta = left.pop(0) if case.center else None
        return kernel(x, gamma, beta, options._replace(add=add))

    return call


def truth(case: Case, drawn: Any, add: Any, *, relu: bool) -> tuple[Any, list[Any]]:
    """Output and gradients of x, gamma, beta and what is added, in float64."""
    known = oracle(case, drawn)
    total = reference.forward(drawn.x, drawn.gamma, drawn.beta, **known).output + add
    through = drawn.gradient * (total > 0) if relu else drawn.gradient
    found = reference.backward(through, drawn.x, drawn.gamma, **known)
    parts = [found.x, *[found.gamma] * case.scale, *[found.beta] * case.center, through]
    return np.maximum(total, 0) if relu else total, parts


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("name", "case"), marked(product(KERNELS, CASES), FEW))
def test_forward_and_backward(name: str, case: Case, relu: bool) -> None:
    with precision(case.dtype):
        drawn, tensors, options = arguments(case)
        add = added(case)
        call = bound(KERNELS[name], case, options._replace(relu=relu))
        tensors = [*tensors, tensor(add, case.dtype)]
        alone = call(*tensors).output
        output, found = gradients(
            lambda *a: call(*a).output, tensors, tensor(drawn.gradient, case.dtype)
        )
        expected, parts = truth(case, drawn, add, relu=relu)
        assert keras.backend.standardize_dtype(alone.dtype) == case.dtype
        for have in (alone, output):  # without gradients, and with
            assert error(array(have), expected) < 4 * EPS[case.dtype]
        for have, want in zip(found, parts, strict=True):
            assert error(array(have), want) < 32 * EPS[case.dtype]
        assert (array(found[-1]) == parts[-1]).all()  # a selection: not a digit is lost


@pytest.mark.parametrize("case", [Case((7, 3), dtype="float64"), Case((3, 2, 4), 1, "float64")])
@pytest.mark.parametrize("name", KERNELS)
def test_second_derivatives(name: str, case: Case) -> None:
    with precision("float64"):
        drawn, (x, gamma, beta), options = arguments(case)
        add = added(case)
        call = bound(KERNELS[name], case, options._replace(relu=True))
        rng = np.random.default_rng(3)
        shapes = (drawn.x.shape, drawn.gamma.shape, drawn.beta.shape, add.shape)
        directions = [rng.normal(size=shape) for shape in shapes]

        def first(x: Any, gamma: Any, gradient: Any) -> Any:
            given = (x, gamma, beta, tensor(add, "float64"))
            _, found = gradients(lambda *a: call(*a).output, given, gradient)
            return sum(
                keras.ops.sum(f * tensor(d, "float64"))
                for f, d in zip(found, directions, strict=True)
            )

        at = (x, gamma, tensor(drawn.gradient, "float64"))
        _, second = gradients(first, at, tensor(1.0, "float64"))
        origin = (drawn.x, drawn.gamma, drawn.gradient)
        for which, have in enumerate(second):
            toward = rng.normal(size=origin[which].shape)

            def moved(step: float, which: int = which, toward: Any = toward) -> float:
                values = list(origin)
                values[which] = values[which] + step * toward
                there = drawn.__class__(values[0], values[1], drawn.beta, values[2], drawn.mask)
                _, found = truth(case, there, add, relu=True)
                return float(sum((f * d).sum() for f, d in zip(found, directions, strict=True)))

            expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
            assert float((array(have) * toward).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_nan_stays(name: str) -> None:
    x, add = np.random.default_rng(0).normal(size=(2, 8, 3))
    add[0, 1] = np.nan
    options = Options(-1, 1e-3, relu=True, add=tensor(add))
    output = array(KERNELS[name](tensor(x), None, None, options).output)
    assert np.argwhere(np.isnan(output)).tolist() == [[0, 1]]


@pytest.mark.skipif(BACKEND != "torch", reason="orders of memory are PyTorch's")
@pytest.mark.parametrize("order", ["channels_last", "sliced", "negated"])
def test_any_order_of_memory(order: str) -> None:
    import torch

    rng = np.random.default_rng(0)
    x, add, dy = (torch.tensor(rng.normal(size=(4, 6, 5, 7)).astype("float32")) for _ in range(3))
    if order == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif order == "sliced":
        add, dy = (torch.repeat_interleave(values, 2, 1)[:, ::2] for values in (add, dy))
    else:
        add, dy = (torch.complex(torch.zeros_like(t), -t).conj().imag for t in (add, dy))
    leaves = [x.detach().requires_grad_(), add.detach().requires_grad_()]
    options = Options(1, 1e-3, relu=True, add=leaves[1])
    output = KERNELS["selected"](leaves[0], None, None, options).output
    d_x, d_add = torch.autograd.grad(output, leaves, dy)
    numbers = [t.resolve_neg().numpy() for t in (x, add, dy)]
    total = reference.forward(numbers[0], axis=1).output + numbers[1]
    through = numbers[2] * (total > 0)
    assert error(array(output.detach()), np.maximum(total, 0)) < 4 * EPS["float32"]
    assert (array(d_add) == through).all()
    assert (
        error(array(d_x), reference.backward(through, numbers[0], axis=1).x) < 16 * EPS["float32"]
    )
