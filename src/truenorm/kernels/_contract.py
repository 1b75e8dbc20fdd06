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
        count: Number of values per channel that the statistics are of; a scalar.
    """

    output: Any
    mean: Any
    variance: Any
    count: Any


def statistics_dtype(x: Any) -> str:
    """The dtype of the maths for an input: its own, float32 at least."""
    return backend.result_type(x.dtype, "float32")
