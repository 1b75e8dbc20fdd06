"""What a training-mode kernel returns, and in which precision it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras import backend


@dataclass(frozen=True)
class Normalized:
    """One normalised batch and its statistics.

    Args:
        output: As the input, in the input's dtype.
        mean: Mean per channel, shape ``(channels,)``, :func:`statistics_dtype`; no gradient.
        variance: Population (biased) variance per channel, as ``mean``.
        count: Number of values per channel that the statistics are of: a scalar tensor, or a number
            where it is known.
        finite: True where mean and variance are known to be finite numbers in all channels.
        batches: Number of (ghost) batches that the statistics are the average of.
    """

    output: Any
    mean: Any
    variance: Any
    count: Any
    batches: Any = 1
    finite: bool = False


def statistics_dtype(dtype: Any) -> str:
    """The dtype of the maths for values of a dtype: float64 for itself, else float32.

    (Keras's ``result_type`` makes float32 of float64 on JAX and PyTorch.)
    """
    return "float64" if backend.standardize_dtype(dtype) == "float64" else "float32"
