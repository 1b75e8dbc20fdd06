"""The contract of a training-mode kernel: what it takes, what it returns, and how precisely.

A kernel computes in float32 at least. Its output differentiates through the statistics, right to
the second order at least, with respect to ``x``, ``gamma``, ``beta`` and ``options.add``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from keras import backend

Tensor: TypeAlias = Any
"""A tensor of the backend in use, of any shape; the frameworks have no common type."""

Vector: TypeAlias = Any
"""A tensor of one number per channel, shape ``(channels,)``."""

Scalar: TypeAlias = Any
"""A tensor of one number, or the number itself."""

Variable: TypeAlias = Any
"""A Keras variable."""


class Moving(NamedTuple):
    """A layer's moving statistics, before the batch.

    Args:
        mean: Shape ``(channels,)``.
        variance: As ``mean``.
        momentum: Weight of these in the step toward the batch's; None: the layer takes the step. On
            PyTorch the step may be taken in their memory.
        unbiased: Whether the step is toward the unbiased variance of the batch.
        domain: Of which domain they are, where a layer has several; one batch is of one.
    """

    mean: Vector
    variance: Vector
    momentum: float | None = None
    unbiased: bool = False
    domain: Scalar | None = None


class Options(NamedTuple):
    """How to normalise.

    Args:
        axis: Which axis holds the channels; all the others are reduced.
        epsilon: Added to the variance, in units of ``x`` squared.
        mask: Booleans of the rank of ``x``, each axis of its size or 1 (``masks.aligned``), or
            None. False: the value does not count in the statistics. It is normalised all the same.
        moving: A layer's moving statistics, or None. They normalise a channel of which the mask
            leaves no value; and a kernel to which it costs nothing moves them
            (``Normalized.moved``).
        relu: Whether negative outputs become 0, in the same pass where the backend can.
        add: Added to the output before the ReLU, likewise: of the shape and dtype of ``x``, or
            None. (Where it takes another pass, 16-bit outputs are rounded before and after.) Only
            ``normalize`` takes it, not the kernels of ghost batches and of synchronized ones.
        correct: Makes of the batch's statistics (its output is None, or not to be read), gamma and
            beta those that take the place of gamma and beta, or None. The statistics are constants
            there. The kernel of ghost batches does not take it.
    """

    axis: int
    epsilon: float
    mask: Tensor | None = None
    moving: Moving | None = None
    relu: bool = False
    add: Tensor | None = None
    correct: Callable[[Normalized, Vector | None, Vector | None], tuple[Vector, Vector]] | None = (
        None
    )


class Normalized(NamedTuple):
    """One normalised batch and its statistics.

    Args:
        output: As the input, in the input's dtype.
        mean: Mean per channel, :func:`statistics_dtype`; no gradient. None where the step has been
            taken in memory.
        variance: Population (biased) variance per channel, as ``mean``.
        count: Number of values per channel that the statistics are of: one number, or one for
            each channel where the mask differs between channels.
        batches: Number of (ghost) batches that the statistics are the average of.
        moved: Where the kernel has taken the step, by the rules of ``_layer/moving_average.py``:
            the moving mean and variance after it, or nothing if they lie where those before it lay.
            None: the layer takes it.
    """

    output: Tensor
    mean: Vector
    variance: Vector
    count: Scalar | Vector
    batches: Scalar | Vector = 1
    moved: tuple[Vector, ...] | None = None


class Kernel(Protocol):
    """Normalises a batch with its own statistics.

    ``x`` holds floating-point values, of any rank from 2 and any size (0 included). ``gamma`` and
    ``beta`` are scale and offset per channel; None: 1 and 0.
    """

    def __call__(
        self, x: Tensor, gamma: Vector | None, beta: Vector | None, options: Options
    ) -> Normalized:
        """The output and the batch's statistics."""
        ...


def statistics_dtype(dtype: Any) -> str:
    """The dtype of the maths for values of a dtype: float64 for itself, else float32.

    (Keras's ``result_type`` makes float32 of float64 on JAX and PyTorch.)
    """
    return "float64" if backend.standardize_dtype(dtype) == "float64" else "float32"
