"""Which statistics normalised a call: from the methods that ran, or from the call's own numbers.

Of Keras's layer and ours the methods that ran tell exactly. A custom subclass may do anything in a
``call`` of its own. What it did shows in its output: it equals what the input becomes under the
batch's own statistics, or under the moving ones, or neither. How near counts as equal is read off
how far those two are apart. Where they are not further apart than rounding can explain, or the
numbers cannot be had, nothing can be said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from truenorm._keras_internals import moments_method
from truenorm._kernels import reference
from truenorm._kernels.masks import lacking
from truenorm._kernels.run_time import tell, when_run
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.hooks import noted, put_in_place
from truenorm._records.observation import Statistics

ops: Any = keras.ops
NEAR = 0.05
"""An output is one of two normalisations if it is away from it by at most this share of what they
are apart."""

MOST_VALUES = 2**22
"""As many channels are looked at as have so many values together, since each says the same."""

_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
_SINGLE = 2.0**-24


def witnessed(
    layer: BatchNormalizationLike,
    original: Callable[..., Any],
    inputs: Any,
    arguments: Mapping[str, Any],
    note: Callable[[Statistics], None],
    *,
    once: bool,
) -> Any:
    """The output of a layer's call; ``note`` is told what normalised each time it is computed.

    Args:
        layer: A BatchNormalization.
        original: Its ``call``.
        inputs: What it is called with,
        arguments: and with what else.
        note: Takes the statistics that normalised.
        once: Whether the call is known to be computed as often as Python comes here.
    """
    if has_own_call(layer):
        return _witnessed_by_numbers(layer, original, inputs, arguments, note)
    ran: list[str] = []
    with noted(layer, ("_normalize_batch", moments_method()), lambda: ran.append("batch")):
        outputs = original(inputs, **arguments)
    used: Statistics = "batch" if ran else "moving"
    if once:
        note(used)
    else:
        when_run(lambda: note(used), outputs)
    return outputs


def has_own_call(layer: BatchNormalizationLike) -> bool:
    """Whether what a layer computes is not, or not only, Keras's or ours."""
    ours = isinstance(layer, BatchNormalization)
    base = BatchNormalization if ours else keras.layers.BatchNormalization
    names = ("call", moments_method(), "_normalize_batch", "_normalize_moving")
    if any(getattr(type(layer), name, None) is not getattr(base, name, None) for name in names):
        return True
    return put_in_place(layer, "call") is not None


def _witnessed_by_numbers(
    layer: BatchNormalizationLike,
    original: Callable[..., Any],
    inputs: Any,
    arguments: Mapping[str, Any],
    note: Callable[[Statistics], None],
) -> Any:
    before = [ops.copy(variable) for variable in (layer.moving_mean, layer.moving_variance)]
    outputs = original(inputs, **arguments)
    more = [layer.renorm, layer.synchronized, getattr(layer, "virtual_batch_size", None)]
    more.append(arguments.get("add") is not None)
    if any(more) or getattr(layer, "activation", None) is not None:
        when_run(lambda: note("unknown"), outputs)
        return outputs
    mask = arguments.get("mask")
    tensors = {
        "inputs": inputs,
        "outputs": outputs,
        **dict(zip(("mean", "variance"), before, strict=True)),
        "gamma": None if layer.gamma is None else ops.convert_to_tensor(layer.gamma),
        "beta": None if layer.beta is None else ops.convert_to_tensor(layer.beta),
        "mask": None if mask is None else ops.convert_to_tensor(mask),
    }
    known: dict[str, Any] = {"axis": layer.axis, "epsilon": layer.epsilon}
    dtype = keras.backend.standardize_dtype(outputs.dtype)
    if not tell(lambda found: note(statistics_of(found, **known, dtype=dtype)), tensors):
        note("unknown")
    return outputs


def statistics_of(
    numbers: Mapping[str, Any], *, axis: int, epsilon: float, dtype: str
) -> Statistics:
    """Which statistics normalised a call.

    Args:
        numbers: ``inputs``, ``outputs``; ``mean`` and ``variance``, the moving ones before the
            call; ``gamma``, ``beta`` and ``mask``, or None for each.
        axis: The channel axis.
        epsilon: The layer's.
        dtype: That of the outputs.
    """
    x, y, mask = (numbers[name] for name in ("inputs", "outputs", "mask"))
    if x.shape != y.shape:
        return "neither"
    mask = _stretched(mask, x, axis)
    if mask is None or not mask.any():
        return "unknown"
    # Of a channel without a value that counts, the batch says nothing.
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    channels = np.flatnonzero(mask.any(others))
    few = channels[: max(1, MOST_VALUES * x.shape[axis] // x.size)]
    x, y = (np.take(array, few, axis).astype(np.float64) for array in (x, y))
    mask = np.take(mask, few, axis)
    mean, variance, gamma, beta = (
        None if numbers[name] is None else numbers[name][few].astype(np.float64)
        for name in ("mean", "variance", "gamma", "beta")
    )
    with np.errstate(all="ignore"):  # a number that is not finite makes it unknown
        whole = reference.forward(x, gamma, beta, axis=axis, epsilon=epsilon)
        masked = reference.forward(x, gamma, beta, axis=axis, epsilon=epsilon, mask=mask)
        moving = reference.infer(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
        batch = min((whole.output, masked.output), key=lambda output: _apart(y, output))
        # Rounding: of the output, and of statistics in float32, which a large mean makes worse.
        condition = 1 + np.max(np.abs(x)) ** 2 / (np.min(whole.variance) + epsilon)
        rounding = 4 * _ROUNDING.get(dtype, _SINGLE) * _apart(y, 0)
        rounding += 8 * _SINGLE * condition * _apart(batch, 0 if beta is None else np.mean(beta))
        near = NEAR * _apart(batch, moving)
        if not near > rounding:
            return "unknown"
        if _apart(y, batch) <= near:
            return "batch"
        return "moving" if _apart(y, moving) <= near else "neither"


def _stretched(mask: Any, x: Any, axis: int) -> Any:
    """Whether each value counts, in the shape of the input; None if the mask does not fit it."""
    if mask is None:
        return np.ones(x.shape, bool)
    lacks = lacking(mask.shape, x.shape, axis)
    if not lacks:
        return None
    return np.broadcast_to(np.expand_dims(mask.astype(bool), lacks[0]), x.shape)


def _apart(a: Any, b: Any) -> float:
    """Root of the mean square of the differences."""
    return float(np.sqrt(np.mean((a - b) ** 2)))
