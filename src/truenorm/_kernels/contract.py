"""What a training-mode kernel returns, and in which precision it computes."""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import backend


class Moving(NamedTuple):
    """A layer's moving statistics, before the batch.

    Args:
        mean: Shape ``(channels,)``.
        variance: As ``mean``.
        momentum: Weight of these in the step toward the batch's; None: the layer takes the step. On
            PyTorch the step may be taken in their memory.
        unbiased: Whether the step is toward the unbiased variance of the batch.
    """

    mean: Any
    variance: Any
    momentum: float | None = None
    unbiased: bool = False


class Normalized(NamedTuple):
    """One normalised batch and its statistics.

    Args:
        output: As the input, in the input's dtype.
        mean: Mean per channel, shape ``(channels,)``, :func:`statistics_dtype`; no gradient. None
            where the step has been taken in memory.
        variance: Population (biased) variance per channel, as ``mean``.
        count: Number of values per channel that the statistics are of: a scalar tensor, or a number
            where it is known.
        batches: Number of (ghost) batches that the statistics are the average of.
        moved: Where the kernel has taken the step, by the rules of ``_layer/moving_average.py``:
            the moving mean and variance after it, or nothing if they lie where those before it lay.
            None: the layer takes it.
    """

    output: Any
    mean: Any
    variance: Any
    count: Any
    batches: Any = 1
    moved: tuple[Any, ...] | None = None


def statistics_dtype(dtype: Any) -> str:
    """The dtype of the maths for values of a dtype: float64 for itself, else float32.

    (Keras's ``result_type`` makes float32 of float64 on JAX and PyTorch.)
    """
    return "float64" if backend.standardize_dtype(dtype) == "float64" else "float32"
