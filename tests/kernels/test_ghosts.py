"""Ghost batches of equal size, which fast kernels take: the reference's numbers, group by group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import EPSILON, Case, Drawn, array, error, gradients, precision, tensor

from truenorm import _kernels as kernels
from truenorm._kernels import library, reference
from truenorm._kernels.contract import Options

SIZE = 8
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
CASES = (
    *(Case(shape) for shape in ((48, 5), (8, 5), (40, 600), (48, 7, 3), (16, 3, 3, 700))),
    *(Case(shape, 1) for shape in ((48, 5, 7), (16, 3, 4, 4))),
    Case((24, 3, 4, 5), scale=False, center=False),
    *(Case(shape, mean=1000, deviation=0.05) for shape in ((32, 6), (32, 2, 6), (16, 9, 9, 6))),
    *(Case((32, 4, 4, 6), dtype=dtype) for dtype in ("float64", "float16", "bfloat16")),
)


@pytest.fixture(params=["with the library", "without it"])
def normalize(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "without it":
        monkeypatch.setattr(library, "loaded", lambda: None)
        if keras.config.backend() == "jax":
            monkeypatch.setattr("truenorm._kernels.jax.native.takes", lambda _: False)
    return kernels.normalize_ghosts


def by_groups(function: Callable[..., Any], groups: int, *arrays: Any) -> list[Any]:
    """What a function of one group gives, for each of them."""
    return [function(*(a[g::groups] for a in arrays)) for g in range(groups)]


def together(parts: list[Any]) -> np.ndarray:
    """The samples of all groups in their order."""
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def bound(normalize: Any, case: Case) -> Callable[..., Any]:
    def call(x: Any, *weights: Any, relu: bool = False) -> Any:
        return normalize(
            x, *(weights or (None, None)), Options(case.axis, EPSILON, relu=relu), size=SIZE
        )

    return call


def prepared(case: Case) -> tuple[Drawn, list[Any], int]:
    drawn = case.draw()
    wide = "float64" if case.dtype == "float64" else "float32"
    weights = [tensor(w, wide) for w in (drawn.gamma, drawn.beta) if w is not None]
    return drawn, [tensor(drawn.x, case.dtype), *weights], len(drawn.x) // SIZE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_statistics_and_gradients(normalize: Any, case: Case) -> None:
    with precision(case.dtype):
        drawn, tensors, groups = prepared(case)
        call = bound(normalize, case)
        batch = call(*tensors)
        output, found = gradients(
            lambda *a: call(*a).output, tensors, tensor(drawn.gradient, case.dtype)
        )
        known: dict[str, Any] = {"axis": case.axis, "epsilon": EPSILON}
        forward = by_groups(
            lambda x: reference.forward(x, drawn.gamma, drawn.beta, **known), groups, drawn.x
        )
        backward = by_groups(
            lambda dy, x: reference.backward(dy, x, drawn.gamma, **known),
            *(groups, drawn.gradient, drawn.x),
        )
        eps = EPS[case.dtype]
        wide = EPS["float64"] if case.dtype == "float64" else EPS["float32"]
        hard = case.mean != 0.5
        for have in (batch.output, output):
            assert error(array(have), together([b.output for b in forward])) < 4 * eps
        assert error(array(batch.mean), np.mean([b.mean for b in forward], 0)) < 8 * wide
        variance = np.mean([b.variance for b in forward], 0)
        assert error(array(batch.variance), variance) < 8 * wide
        assert float(batch.count) == drawn.x.size / case.channels
        assert float(batch.batches) == groups
        want = together([b.x for b in backward])
        assert error(array(found[0]), want) < (16 if hard else 8) * eps
        for which, have in zip(("gamma", "beta"), found[1:], strict=False):
            want = sum(getattr(b, which) for b in backward)
            assert error(array(have), want) < 50 * wide


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "case", [Case((16, 3), dtype="float64"), Case((16, 2, 3), dtype="float64")], ids=str
)
def test_second_derivatives(normalize: Any, case: Case, relu: bool) -> None:
    known: dict[str, Any] = {"axis": case.axis, "epsilon": EPSILON}
    with precision("float64"):
        drawn, (x, gamma, beta), groups = prepared(case)
        call = bound(normalize, case)
        rng = np.random.default_rng(3)
        direction, toward = rng.normal(size=(2, *case.shape))

        def first(x: Any) -> Any:
            _, found = gradients(
                lambda *a: call(*a, relu=relu).output,
                *((x, gamma, beta), tensor(drawn.gradient, "float64")),
            )
            return keras.ops.sum(found[0] * tensor(direction, "float64"))

        _, (second,) = gradients(first, (x,), tensor(1.0, "float64"))

        def truth(x: Any, dy: Any) -> Any:
            if relu:
                dy = dy * (reference.forward(x, drawn.gamma, drawn.beta, **known).output > 0)
            return reference.backward(dy, x, drawn.gamma, **known).x

        def moved(step: float) -> float:
            parts = by_groups(truth, groups, drawn.x + step * toward, drawn.gradient)
            return float((together(parts) * direction).sum())

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert float((array(second) * toward).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3)], ids=str)
def test_an_empty_batch(normalize: Any, shape: tuple[int, ...]) -> None:
    batch = normalize(tensor(np.ones(shape)), None, None, Options(-1, EPSILON), size=SIZE)
    assert tuple(batch.output.shape) == shape
    assert float(batch.count) == float(batch.batches) == 0
    assert not np.concatenate([array(batch.mean), array(batch.variance)]).any()
