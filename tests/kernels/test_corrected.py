"""Gamma and beta that the batch's statistics correct, as in batch renormalization: all kernels."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import EPSILON, EVERY_KIND, Case, array, error, gradients, precision, tensor
from test_kernels import BACKEND, EPS, KERNELS, arguments, marked, oracle

from truenorm._kernels import composite, reference
from truenorm._kernels.contract import Moving, Options
from truenorm._layer.renorm import Renorm

CASES = (
    *EVERY_KIND,
    Case((64, 5), mean=1000, deviation=0.5),
    Case((1, 5)),
    Case((4, 5, 6, 3), -1, "float16"),
    Case((4, 5, 6, 3), 1, "bfloat16"),
)
WHOLE, PLAIN, MASKED, KERAS_MASK = CASES[0], CASES[2], CASES[6], CASES[7]
FEW = (PLAIN, MASKED, KERAS_MASK, *CASES[8:10], CASES[12])
CLIPPING = {"rmin": 0.9, "rmax": 1.6, "dmax": 0.5}
HOW = ("eager", "graph", "XLA") if BACKEND == "tensorflow" else ("eager",)
USUAL = "graph" if BACKEND == "tensorflow" else "eager"
STEPS = (
    *((name, case, USUAL, "nothing") for name in KERNELS for case in CASES),
    *((name, one, USUAL, "add and relu") for name in KERNELS for one in (PLAIN, KERAS_MASK)),
    *(("selected", one, how, "nothing") for how in HOW for one in (WHOLE, MASKED) if how != USUAL),
)


def run(how: str, function: Callable[..., Any], *given: Any) -> Any:
    """In a graph where TensorFlow makes one."""
    if how == "eager":
        return function(*given)
    import tensorflow as tf

    graph: Any = tf.function(function, jit_compile=how == "XLA")
    return graph(*given)


def remembered(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The mean and deviation toward which a batch is corrected: near the true ones, and not."""
    steps = np.linspace(-1, 1, case.channels)
    return case.mean + case.deviation * steps, case.deviation * (1.2 + 0.5 * steps)


def options_of(case: Case, options: Options) -> Options:
    wide = "float64" if case.dtype == "float64" else "float32"
    mean, deviation = (SimpleNamespace(value=tensor(v, wide)) for v in remembered(case))
    renorm: Any = Renorm(mean, deviation, deviation, 0.9, CLIPPING, EPSILON)
    return options._replace(correct=renorm.correct)


def bound(kernel: Any, case: Case, options: Options) -> Any:
    def call(x: Any, *values: Any) -> Any:
        left = list(values)
        gamma = left.pop(0) if case.scale else None
        beta = left.pop(0) if case.center else None
        add = left.pop(0) if left else None
        batch = kernel(x, gamma, beta, options._replace(add=add))
        return batch.output, batch.mean, batch.variance

    return call


def correction(case: Case, drawn: Any) -> tuple[np.ndarray, np.ndarray]:
    """The factors r and d, in float64."""
    forward = reference.forward(drawn.x, **oracle(case, drawn))
    mean, deviation = remembered(case)
    r = np.clip(np.sqrt(forward.variance + EPSILON) / deviation, 0.9, 1.6)
    d = np.clip((forward.mean - mean) / deviation, -0.5, 0.5)
    some = forward.count > 0
    return np.where(some, r, 1), np.where(some, d, 0)


def truth(case: Case, drawn: Any, add: Any, *, relu: bool) -> tuple[Any, list[Any]]:
    """Output and gradients of x, gamma, beta and what is added; r and d are constants."""
    r, d = correction(case, drawn)
    gamma = 1.0 if drawn.gamma is None else drawn.gamma
    beta = 0.0 if drawn.beta is None else drawn.beta
    known = oracle(case, drawn)
    output = reference.forward(drawn.x, r * gamma, d * gamma + beta, **known).output
    output = output if add is None else output + add
    through = drawn.gradient * (output > 0) if relu else drawn.gradient
    found = reference.backward(through, drawn.x, r * gamma, **known)
    of_gamma = r * found.gamma + d * found.beta
    parts = [found.x, *[of_gamma] * case.scale, *[found.beta] * case.center]
    parts += [] if add is None else [through]
    return np.maximum(output, 0) if relu else output, parts


def apart_from_zero(case: Case, drawn: Any) -> np.ndarray:
    """What is added; no sum has a sign that is a matter of rounding."""
    values = np.random.default_rng(3).normal(size=case.shape)
    total, _ = truth(case, drawn, values, relu=False)
    return array(tensor(np.where(np.abs(total) < 0.1, values + 0.3, values), case.dtype))


@pytest.mark.parametrize(("name", "case", "how", "behind"), marked(STEPS, FEW))
def test_forward_and_backward(name: str, case: Case, how: str, behind: str) -> None:
    with precision(case.dtype):
        drawn, tensors, options = arguments(case)
        options = options_of(case, options)._replace(relu="relu" in behind)
        add = None
        if "add" in behind:
            add = apart_from_zero(case, drawn)
            tensors = [*tensors, tensor(add, case.dtype)]
        call = bound(KERNELS[name], case, options)
        upstream = tensor(drawn.gradient, case.dtype)
        output, mean, variance = run(how, call, *tensors)

        def step(*given: Any) -> Any:
            return gradients(lambda *a: call(*a)[0], given[:-1], given[-1])

        again, found = run(how, step, *tensors, upstream)
        expected, parts = truth(case, drawn, add, relu="relu" in behind)
        batch = reference.forward(drawn.x, **oracle(case, drawn))
        wide = EPS["float64"] if case.dtype == "float64" else EPS["float32"]
        rounding = 512 if case.mean == 1000 else 1  # of d, whose mean is float32
        assert keras.backend.standardize_dtype(output.dtype) == case.dtype
        for have in (output, again):
            assert error(array(have), expected) < 4 * EPS[case.dtype] * rounding
        assert error(array(mean), batch.mean) < 8 * wide
        assert error(array(variance), batch.variance) < 8 * wide
        for have, want in zip(found, parts, strict=True):
            assert error(array(have), want) < 64 * EPS[case.dtype] * rounding


@pytest.mark.parametrize("name", KERNELS)
def test_where_nothing_counts_the_moving_statistics_normalise(name: str) -> None:
    case = Case((6, 7, 5))
    drawn, tensors, options = arguments(case)
    mean, variance = np.linspace(0, 1, 5), np.linspace(1, 2, 5)
    options = options_of(case, options)._replace(
        mask=tensor(np.zeros((6, 7, 1)), "bool"), moving=Moving(tensor(mean), tensor(variance))
    )
    output, _, _ = run(USUAL, bound(KERNELS[name], case, options), *tensors)
    expected = reference.infer(drawn.x, mean, variance, drawn.gamma, drawn.beta, epsilon=EPSILON)
    assert error(array(output), expected) < 4 * EPS["float32"]


@pytest.mark.parametrize("name", KERNELS)
def test_moving_statistics_take_the_step_or_stay(name: str) -> None:
    case = Case((6, 7, 5))
    drawn, (x, gamma, beta), options = arguments(case)
    old = (np.linspace(0, 1, 5), np.linspace(1, 2, 5))
    moving = Moving(tensor(old[0]), tensor(old[1]), momentum=0.75)
    options = options_of(case, options)._replace(moving=moving)

    def call(x: Any) -> Any:
        return KERNELS[name](x, gamma, beta, options).moved

    moved = run(USUAL, call, x)
    batch = reference.forward(drawn.x, **oracle(case, drawn))
    new = (batch.mean, batch.variance)
    after = old if moved is None else [0.75 * o + 0.25 * n for o, n in zip(old, new, strict=True)]
    for have, want in zip(moved or moving[:2], after, strict=True):
        assert error(array(have), want) < 8 * EPS["float32"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_second_derivatives(name: str, masked: bool) -> None:
    """As those of the composite, which the framework differentiates."""
    case = Case((7, 4, 3), dtype="float64", masked=masked)
    with precision("float64"):
        drawn, tensors, options = arguments(case)
        options = options_of(case, options)
        directions = [tensor(np.cos(np.arange(d.size)).reshape(d.shape), "float64")
                      for d in (drawn.x, drawn.gamma, drawn.beta)]  # fmt: skip

        def second(kernel: Any) -> list[Any]:
            call = bound(kernel, case, options)

            def first(*at: Any) -> Any:
                _, found = gradients(lambda *a: call(*a)[0] ** 2, at, at[0])
                return sum(keras.ops.sum(f * d) for f, d in zip(found, directions, strict=True))

            return run(USUAL, lambda *at: gradients(first, at, tensor(1.0, "float64"))[1], *tensors)

        for have, want in zip(second(KERNELS[name]), second(composite.normalize), strict=True):
            assert error(array(have), array(want)) < 1e-10
