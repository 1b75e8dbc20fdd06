"""JAX on a processor: the moments by the compiled passes, as a custom call of XLA.

Only the moments: XLA joins what is done value by value with what stands before and behind it, which
in whole models saves more than a compiled pass that is faster by itself (docs/performance.md).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import jax
import keras
import numpy as np
from jax import numpy as jnp

from truenorm.kernels import _native


def takes(x: Any) -> bool:
    """Whether the compiled passes can take such an array.

    Of an array that is spread over devices, a custom call would have to gather the parts first.
    Where a size is a symbol, a program is exported: a custom call would bind it to the library.
    """
    return (
        all(isinstance(size, int) for size in x.shape)
        and x.size > 0
        and str(x.dtype) in _native.DTYPES
        and jax.default_backend() == "cpu"
        and keras.distribution.distribution() is None
        and _registered()
    )


def moments(rows: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """Mean, what rounding takes from it, and variance; ``rows`` is (outer, channels[, inner])."""
    outer, channels, *inner = rows.shape
    code, threads = _native.DTYPES[str(rows.dtype)], os.cpu_count() or 1
    numbers = np.array((outer, channels, *(inner or [1]), code, threads), np.int64)
    call = jax.ffi.ffi_call(
        "tn_xla_moments",
        jax.ShapeDtypeStruct((4, channels), dtype),
        vmap_method="sequential",
        custom_call_api_version=1,
    )
    # As 32-bit words: JAX has no others where it was not asked for them.
    mean, variance, low, _ = call(jnp.asarray(numbers.view("int32")), rows)
    return mean, low, variance


@cache
def _registered() -> bool:
    library = _native.library()
    if library is None:
        return False
    target = jax.ffi.pycapsule(library.tn_xla_moments)
    try:
        jax.ffi.register_ffi_target("tn_xla_moments", target, platform="cpu", api_version=0)
    except (NotImplementedError, RuntimeError, ValueError):  # a JAX without this interface
        return False
    return True
