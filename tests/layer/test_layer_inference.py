"""Inference mode: outputs and gradients against float64, never worse than the stock layer's."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import (
    DTYPES,
    EPSILON,
    HARD,
    PARAMETERS,
    SHAPES,
    Case,
    Drawn,
    array,
    error,
    gradients,
    precision,
    tensor,
)

from truenorm import BatchNormalization

ULP = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
POLICIES = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}


def statistics(drawn: Drawn, axis: int) -> list[Any]:
    """Mean and variance as a model stores them: in 32 bits, and near those of the input."""
    reduced = tuple(a for a in range(drawn.x.ndim) if a != axis % drawn.x.ndim)
    found = [drawn.x.mean(reduced), 1.1 * drawn.x.var(reduced)]
    return [value.astype("float32").astype("float64") for value in found]


def expected(drawn: Drawn, axis: int) -> list[Any]:
    """Output, and gradients of x, gamma and beta, in float64."""
    shape = [1] * drawn.x.ndim
    shape[axis] = -1
    reduced = tuple(a for a in range(drawn.x.ndim) if a != axis % drawn.x.ndim)
    mean, variance = (value.reshape(shape) for value in statistics(drawn, axis))
    gamma = 1.0 if drawn.gamma is None else drawn.gamma.reshape(shape)
    beta = 0.0 if drawn.beta is None else drawn.beta.reshape(shape)
    scale = 1 / np.sqrt(variance + EPSILON)
    normalized = (drawn.x - mean) * scale
    of_gamma = (drawn.gradient * normalized).sum(reduced)
    of_beta = drawn.gradient.sum(reduced)
    found = [normalized * gamma + beta, drawn.gradient * gamma * scale]
    return [*found, *[of_gamma] * (drawn.gamma is not None), *[of_beta] * (drawn.beta is not None)]


def restored(kind: Any, case: Case, drawn: Drawn, *, frozen: bool) -> Any:
    """A layer of this class with the parameters and statistics of the case."""
    layer = kind(
        axis=case.axis,
        scale=case.scale,
        center=case.center,
        dtype=POLICIES.get(case.dtype, case.dtype),
        trainable=not frozen,
    )
    layer.build(case.shape)
    values = [drawn.gamma] * case.scale + [drawn.beta] * case.center
    numbers = [*values, *statistics(drawn, case.axis)]
    for variable, value in zip(layer.variables, numbers, strict=True):
        variable.assign(value)
    return layer


def run(kind: Any, case: Case, drawn: Drawn, *, frozen: bool) -> list[np.ndarray]:
    """The same, as a layer of this class gives it; of a frozen one no gamma and beta."""
    layer = restored(kind, case, drawn, frozen=frozen)
    weights = layer.trainable_variables

    def call(x: Any, *inside: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(weights, inside, strict=True))):
            return layer(x, training=False)

    wide = "float64" if case.dtype == "float64" else "float32"
    values = [] if frozen else [drawn.gamma] * case.scale + [drawn.beta] * case.center
    learning = [tensor(value, wide) for value in values]
    upstream = keras.ops.cast(tensor(drawn.gradient, case.dtype), layer.compute_dtype)
    output, found = gradients(call, [tensor(drawn.x, case.dtype), *learning], upstream)
    if keras.config.backend() == "torch":
        output, found = output.detach(), [f.detach() for f in found]
    return [array(value) for value in (output, *found)]


@pytest.mark.parametrize(
    "case", [c for c in (*SHAPES[::3], *PARAMETERS, *DTYPES, *HARD[::4]) if not c.masked], ids=str
)
def test_predictions_against_float64_and_the_stock_layer(case: Case) -> None:
    """Without gradients, where PyTorch takes another path."""
    drawn = case.draw()
    found = []
    with precision(case.dtype), without_gradients():
        for kind in (BatchNormalization, keras.layers.BatchNormalization):
            layer = restored(kind, case, drawn, frozen=False)
            found.append(array(layer(tensor(drawn.x, case.dtype), training=False)))
    want = expected(drawn, case.axis)[0]
    assert error(found[0], want) <= error(found[1], want) + ULP[case.dtype]


def without_gradients() -> contextlib.AbstractContextManager[Any]:
    """As ``predict`` calls a layer on PyTorch."""
    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


FROZEN = [(case, True) for case in (*SHAPES[::2], *PARAMETERS, *DTYPES, *HARD[:10])]
LEARNING = [(case, False) for case in (*PARAMETERS, *SHAPES[-4:-2])]


@pytest.mark.parametrize(
    ("case", "frozen"), [c for c in FROZEN + LEARNING if not c[0].masked], ids=str
)
def test_numbers_against_float64_and_the_stock_layer(case: Case, frozen: bool) -> None:
    with precision(case.dtype):
        drawn = case.draw()
        ours = run(BatchNormalization, case, drawn, frozen=frozen)
        stocks = run(keras.layers.BatchNormalization, case, drawn, frozen=frozen)
    few = ULP["float64"] if case.dtype == "float64" else ULP["float32"]
    allowed = [ULP[case.dtype], ULP[case.dtype], 8 * few, 8 * few]
    wanted = expected(drawn, case.axis)
    assert len(ours) == (2 if frozen else len(wanted))
    for have, theirs, want, most in zip(ours, stocks, wanted, allowed, strict=False):
        assert error(have, want) <= error(theirs, want) + most
