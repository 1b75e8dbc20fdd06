"""JAX on a processor: the moments by the compiled passes, as a custom call of XLA.

Only the moments: XLA joins what is done value by value with what stands before and behind it, which
in whole models saves more than a compiled pass that is faster by itself (docs/performance.md).

They are an operation of JAX's own. What becomes of it is decided where JAX makes a program of it: a
custom call where the program is for this processor alone, else JAX's operations, in a program that
is exported or that is for other devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import keras
from jax.extend.core import Primitive
from jax.interpreters import mlir

from truenorm._kernels import library
from truenorm._kernels.contract import Tensor, Vector

TARGET = "tn_xla_moments"


def takes(x: Tensor) -> bool:
    """Whether the compiled passes can take this array.

    Of an array that is spread over devices, a custom call would have to gather the parts first; and
    where a size is a symbol, a program is exported.
    """
    return (
        all(isinstance(size, int) for size in x.shape)
        and x.size > 0
        and not any(jax.typeof(x).sharding.spec)
        and str(x.dtype) in library.DTYPES
        and jax.default_backend() == "cpu"
        and keras.distribution.distribution() is None
        and _registered()
    )


def moments(
    rows: Tensor, *mask: Tensor, dtype: Any, plain: Callable[..., tuple[Vector, ...]]
) -> tuple[Vector, Vector, Vector]:
    """Mean, what rounding takes from it, and variance; ``rows`` is (outer, channels[, inner]).

    Of the rows that count, if there is a mask (outer,) for rows (outer, channels). ``plain`` gives
    the same of the same arguments, in JAX's operations.
    """
    found = _sequential(partial(_moments.bind, dtype=jax.numpy.dtype(dtype), plain=plain))
    mean, variance, low, _ = found(rows, *mask)
    return mean, low, variance


_sequential = jax.custom_batching.sequential_vmap
_moments = Primitive("truenorm_moments")


@_moments.def_abstract_eval
def _shape(rows: Any, *_: Any, dtype: Any, plain: Any) -> Any:
    del plain
    return rows.update(shape=(4, rows.shape[1]), dtype=dtype, weak_type=False)


def _elsewhere(*arrays: Tensor, dtype: Any, plain: Any) -> Tensor:
    mean, low, variance = plain(*arrays, dtype)
    return jax.numpy.stack([mean, variance, low, variance])


@_moments.def_impl
def _here(*arrays: Tensor, dtype: Any, plain: Any) -> Tensor:
    del plain
    result = jax.ShapeDtypeStruct((4, arrays[0].shape[1]), dtype)
    return jax.ffi.ffi_call(TARGET, result)(*arrays)


def _lower(context: Any, *arrays: Any, **options: Any) -> Any:
    """What the operation is in a program that may be for this processor."""
    module = context.module_context
    leaves = module.lowering_parameters.for_export or len(module.platforms) > 1
    which = _elsewhere if leaves or _is_divided(module.axis_context) else _here
    return mlir.lower_fun(which, multiple_results=False)(context, *arrays, **options)


def _is_divided(axes: Any) -> bool:
    """Whether XLA divides the arrays of a program among devices."""
    if hasattr(axes, "manual_axes"):  # Of these each device has its own.
        return not axes.manual_axes.issuperset(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) > 1


@cache
def _registered() -> bool:
    library_ = library.loaded()
    if library_ is None:
        return False
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library_.tn_xla_moments), "cpu")
        mlir.register_lowering(_moments, mlir.lower_fun(_elsewhere, multiple_results=False))
        mlir.register_lowering(_moments, _lower, platform="cpu")
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):  # another version
        return False
    return True
