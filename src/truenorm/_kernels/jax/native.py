"""JAX on a processor: the sums by the compiled passes, as custom calls of XLA.

Only the sums: XLA joins what is done value by value with what stands before and behind it, which
in whole models saves more than a compiled pass that is faster by itself (docs/performance.md). For
a sum it writes to memory what it adds up anyway.

They are operations of JAX's own. What becomes of one is decided where JAX makes a program of it: a
custom call where the program is for this processor alone, else JAX's operations, in a program that
is exported or that is for other devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import keras
from jax.extend.core import Primitive
from jax.interpreters import mlir

from truenorm._kernels import library
from truenorm._kernels.contract import Tensor, Vector

TARGET = "tn_xla_"
"""How the names of the calls begin, as XLA knows them."""


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
    """Mean, what rounding takes from it, and variance; ``rows`` as in ``kernel.py``.

    Of the rows that count, if there is a mask (outer,) for rows (outer, channels). ``plain`` gives
    the same of the same arguments, in JAX's operations.
    """
    return _found("moments", rows, *mask, dtype=dtype, plain=plain)


def products(
    *arrays: Tensor, dtype: Any, plain: Callable[..., tuple[Vector, ...]]
) -> tuple[Vector, Vector]:
    """The gradients of gamma and beta.

    From the rows, the gradient of the output, mean, what rounding took from it, and rstd. ``plain``
    gives the same of the same arguments.
    """
    return _found("products", *arrays, dtype=dtype, plain=plain)


def _found(name: str, *arrays: Tensor, dtype: Any, plain: Any) -> Any:
    options = {"dtype": jax.numpy.dtype(dtype), "plain": plain}
    found = _sequential(partial(_OPERATIONS[name].bind, name=name, **options))(*arrays)
    return tuple(found)


_sequential = jax.custom_batching.sequential_vmap
_RESULTS = {"moments": 3, "products": 2}
_OPERATIONS = {name: Primitive(f"truenorm_{name}") for name in _RESULTS}


def _shapes(rows: Any, *_: Any, name: str, dtype: Any, plain: Any) -> Any:
    del plain
    vector = rows.update(shape=(channels(rows),), dtype=dtype, weak_type=False)
    return [vector] * _RESULTS[name]


def channels(rows: Any) -> int:
    """How many channels the rows have; those of each ghost batch are its own."""
    return math.prod(rows.shape[1::2]) if len(rows.shape) == 4 else rows.shape[1]


def _elsewhere(*arrays: Tensor, name: str, dtype: Any, plain: Any) -> Any:
    del name
    return list(plain(*arrays, dtype))


def _here(*arrays: Tensor, name: str, dtype: Any, plain: Any) -> Any:
    del plain
    vector = jax.ShapeDtypeStruct((channels(arrays[0]),), dtype)
    return jax.ffi.ffi_call(TARGET + name, [vector] * _RESULTS[name])(*arrays)


def _lower(context: Any, *arrays: Any, **options: Any) -> Any:
    """What an operation is in a program that may be for this processor."""
    module = context.module_context
    leaves = module.lowering_parameters.for_export or len(module.platforms) > 1
    which = _elsewhere if leaves or _is_divided(module.axis_context) else _here
    return mlir.lower_fun(which, multiple_results=True)(context, *arrays, **options)


for _operation in _OPERATIONS.values():
    _operation.multiple_results = True
    _operation.def_abstract_eval(_shapes)
    _operation.def_impl(_here)


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
        for name, operation in _OPERATIONS.items():
            call = jax.ffi.pycapsule(getattr(library_, f"tn_xla_{name}"))
            jax.ffi.register_ffi_target(TARGET + name, call, "cpu")
            mlir.register_lowering(operation, mlir.lower_fun(_elsewhere, multiple_results=True))
            mlir.register_lowering(operation, _lower, platform="cpu")
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):  # another version
        return False
    return True
