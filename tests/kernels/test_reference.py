"""The oracle is right: its gradients are those of finite differences, its numbers by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import KERAS_MASKS, MASKS, PARAMETERS, SHAPES, Case

from truenorm._kernels import reference

pytestmark = pytest.mark.any_backend


def differences(loss: Any, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central finite differences of a loss in every component."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        ahead, behind = at.copy(), at.copy()
        ahead[index] += step
        behind[index] -= step
        found[index] = (loss(ahead) - loss(behind)) / (2 * step)
    return found


@pytest.mark.parametrize(
    "case",
    [c for c in SHAPES + PARAMETERS + MASKS + KERAS_MASKS if np.prod(c.shape) < 1000],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    drawn = case.draw()
    options: dict[str, Any] = {"axis": case.axis, "epsilon": 1e-3, "mask": drawn.mask}

    def loss(x: Any, gamma: Any, beta: Any) -> float:
        return float((reference.forward(x, gamma, beta, **options).output * drawn.gradient).sum())

    found = reference.backward(drawn.gradient, drawn.x, drawn.gamma, **options)
    x, gamma, beta = drawn.x, drawn.gamma, drawn.beta
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(found.x, differences(lambda v: loss(v, gamma, beta), x), **tolerance)
    if gamma is not None:
        expected = differences(lambda v: loss(x, v, beta), gamma)
        np.testing.assert_allclose(found.gamma, expected, **tolerance)
    if beta is not None:
        expected = differences(lambda v: loss(x, gamma, v), beta)
        np.testing.assert_allclose(found.beta, expected, **tolerance)


def test_forward_by_hand() -> None:
    result = reference.forward([[1.0], [3.0]], [2.0], [10.0], epsilon=0.0)
    assert result.mean.tolist() == [2.0]
    assert result.variance.tolist() == [1.0]
    assert result.count.tolist() == [2]
    assert result.output.tolist() == [[8.0], [12.0]]


def test_a_masked_value_changes_no_statistic() -> None:
    x = np.array([[1.0], [3.0], [np.nan]])
    result = reference.forward(x, epsilon=0.0, mask=[True, True, False])
    assert (result.mean.item(), result.variance.item(), result.count.item()) == (2.0, 1.0, 2)
    assert result.output[:2].tolist() == [[-1.0], [1.0]]


def test_no_value_leaves_the_fallback() -> None:
    x = np.array([[1.0], [3.0]])
    result = reference.forward(x, epsilon=0.0, mask=[False, False], fallback=([1.0], [4.0]))
    assert result.count.tolist() == [0]
    assert result.output.tolist() == [[0.0], [1.0]]
    gradient = reference.backward(
        np.ones((2, 1)), x, epsilon=0.0, mask=[False, False], fallback=([1.0], [4.0])
    )
    assert gradient.x.tolist() == [[0.5], [0.5]]


def test_a_mask_without_the_last_axis_counts_per_channel() -> None:
    x = np.array([[[1.0, 3.0], [5.0, 7.0]], [[9.0, 11.0], [2.0, 4.0]]])  # (samples, channels, time)
    result = reference.forward(x, axis=1, mask=[[True, False], [True, True]])
    assert result.count.tolist() == [4, 2]
    assert result.mean.tolist() == [6.0, 3.0]
    assert result.variance.tolist() == [17.0, 1.0]
