"""JAX on a processor: the moments by the compiled passes, as a custom call of XLA.

Only the moments: XLA joins what is done value by value with what stands before and behind it, which
in whole models saves more than a compiled pass that is faster by itself (docs/performance.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import keras

from truenorm._kernels import library
from truenorm._kernels.contract import Tensor, Vector

TARGET = "tn_xla_moments"


def takes(x: Tensor) -> bool:
    """Whether the compiled passes can take such an array.

    Of an array that is spread over devices, a custom call would have to gather the parts first.
    Where a size is a symbol, a program is exported: a custom call would bind it to the library.
    """
    return (
        all(isinstance(size, int) for size in x.shape)
        and x.size > 0
        and str(x.dtype) in library.DTYPES
        and jax.default_backend() == "cpu"
        and keras.distribution.distribution() is None
        and _registered()
    )


def moments(rows: Tensor, *mask: Tensor, dtype: Any) -> tuple[Vector, Vector, Vector]:
    """Mean, what rounding takes from it, and variance; ``rows`` is (outer, channels[, inner]).

    Of the rows that count, if there is a mask (outer,) for rows (outer, channels).
    """
    result = jax.ShapeDtypeStruct((4, rows.shape[1]), dtype)
    mean, variance, low, _ = jax.ffi.ffi_call(TARGET, result, vmap_method="sequential")(rows, *mask)
    return mean, low, variance


@cache
def _registered() -> bool:
    library_ = library.loaded()
    if library_ is None:
        return False
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library_.tn_xla_moments), "cpu")
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):  # another version
        return False
    return True
