"""One table of cases for all kernels and layers, and the backend's gradients in NumPy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from truenorm._kernels import reference

EPSILON = 1e-3


@dataclass(frozen=True)
class Case:
    """An input of a BatchNormalization: its shape, channel axis, dtype, parameters and mask."""

    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"
    scale: bool = True
    center: bool = True
    masked: bool | str = False  # or "keras": without the last axis, not the channels
    mean: float = 0.5
    deviation: float = 1.5

    def __str__(self) -> str:
        flags = [
            "x".join(map(str, self.shape)),
            f"axis{self.axis}",
            self.dtype,
            *([] if self.scale else ["no_gamma"]),
            *([] if self.center else ["no_beta"]),
            *(["masked"] if self.masked is True else []),
            *(["keras_mask"] if self.masked == "keras" else []),
            *([f"mean{self.mean:g}_std{self.deviation:g}"] if self.mean != 0.5 else []),
        ]
        return "-".join(flags)

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    def draw(self) -> Drawn:
        """Arrays of this case, the same each time; exact in the case's dtype."""
        rng = np.random.default_rng(7)
        x = rng.normal(self.mean, self.deviation, self.shape)
        rows = tuple(np.delete(self.shape, -1 if self.masked == "keras" else self.axis))
        mask = rng.random(rows) < 0.6 if self.masked else None
        gamma = rng.uniform(0.5, 2, self.channels) if self.scale else None
        beta = rng.normal(size=self.channels) if self.center else None
        gradient = rng.normal(size=self.shape)
        return Drawn(
            *(None if a is None else rounded(a, self.dtype) for a in (x, gamma, beta, gradient)),
            mask,
        )


EVERY_KIND = (
    Case((64, 5)),
    Case((6, 7, 5), 1),
    Case((4, 5, 6, 3), -1, scale=False),
    Case((2, 37, 53, 11)),
    Case((2, 70, 9, 31), 1, center=False),
    Case((6, 7, 5), masked=True),
    Case((6, 7, 5), 1, masked=True),
    Case((6, 7, 5), 1, masked="keras"),
    Case((4, 5, 6, 3), 1, "float64"),
)
"""What takes another way through a kernel each: layouts, sizes, masks, a wide dtype."""


@dataclass(frozen=True)
class Drawn:
    """Arrays in float64, and the mask."""

    x: Any
    gamma: Any
    beta: Any
    gradient: Any
    mask: Any


SHAPES = (
    *(Case((64, 5), axis) for axis in (-1, 1, 0)),
    *(Case((6, 7, 5), axis) for axis in (-1, 1, 0)),
    *(Case((4, 5, 6, 3), axis) for axis in (-1, 1, 2, -4)),
    *(Case((2, 3, 4, 5, 6), axis) for axis in (-1, 1, 3)),
    Case((2, 37, 53, 11)),
    Case((32, 28, 28, 4)),
    Case((8, 6, 6, 1)),
    Case((8, 1, 6, 6), 1),
)
PARAMETERS = tuple(
    Case((5, 4, 4, 3), scale=scale, center=center)
    for scale, center in ((False, True), (True, False), (False, False))
)
MASKS = (
    *(Case((64, 5), axis, masked=True) for axis in (-1, 0)),
    *(Case((6, 7, 5), axis, masked=True) for axis in (-1, 1, 0)),
    *(Case((4, 5, 6, 3), axis, masked=True) for axis in (-1, 1)),
    Case((2, 3, 4, 5, 6), 1, masked=True),
    Case((6, 7, 1), masked=True),
    Case((6, 1, 7), 1, masked=True, scale=False),
)
KERAS_MASKS = (
    *(Case((6, 7, 5), axis, masked="keras") for axis in (1, 0)),
    *(Case((4, 5, 6, 3), axis, masked="keras") for axis in (1, 2)),
    Case((64, 5), 0, masked="keras"),  # a channel counts, or not
    Case((5, 5, 5), 1, masked="keras"),
    Case((6, 1, 7), 1, masked="keras", center=False),
)
DTYPES = tuple(
    Case(shape, axis, dtype, masked=masked)
    for dtype in ("float64", "float16", "bfloat16")
    for shape, axis, masked in (
        ((32, 6), -1, False),
        ((4, 5, 6, 3), -1, False),
        ((4, 5, 6, 3), 1, False),
        ((4, 5, 6, 3), -1, True),
        ((4, 5, 6, 3), 1, "keras"),
    )
)
HARD = (
    *(
        Case(shape, axis, mean=mean, deviation=deviation)
        for shape, axis in (((512, 6), -1), ((8, 9, 9, 5), -1), ((8, 5, 9, 9), 1))
        for mean, deviation in ((1000, 0.05), (100, 0.01), (-3e4, 1), (0, 1e-20), (1e18, 1e17))
    ),
    Case((8, 9, 9, 5), mean=1000, deviation=0.05, masked=True),
)
CASES = SHAPES + PARAMETERS + MASKS + KERAS_MASKS + DTYPES + HARD


def rounded(array: Any, dtype: str) -> np.ndarray:
    """The nearest numbers of a dtype, in float64."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.asarray(array).astype(ml_dtypes.bfloat16).astype("float64")
    return np.asarray(array).astype(dtype).astype("float64")


def tensor(array: Any, dtype: str = "float32") -> Any:
    """A tensor of the backend; None stays None. The way in is exact: float64 or float32."""
    if array is None:
        return None
    if dtype == "bool":
        return keras.ops.convert_to_tensor(np.asarray(array, bool))
    wide = np.asarray(array, "float64" if dtype == "float64" else "float32")
    return keras.ops.cast(keras.ops.convert_to_tensor(wide), dtype)


def array(value: Any) -> np.ndarray:
    """A tensor in NumPy float64."""
    if keras.backend.standardize_dtype(value.dtype) == "bfloat16":
        value = keras.ops.cast(value, "float32")
    return np.asarray(keras.ops.convert_to_numpy(value), "float64")


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """JAX has float64 only where it is asked for."""
    if dtype == "float64" and keras.config.backend() == "jax":
        from truenorm._kernels.jax.sums import float64

        with float64():
            yield
    else:
        yield


def gradients(
    function: Callable[..., Any], arguments: Sequence[Any], upstream: Any
) -> tuple[Any, list[Any]]:
    """``function(*arguments)``, and the gradients of its product with ``upstream``, as tensors.

    They can be differentiated again when called inside another ``gradients``.
    """
    output, found, _ = gradients_and_state(lambda *a: (function(*a), ()), arguments, upstream)
    return output, found


def gradients_and_state(
    function: Callable[..., tuple[Any, Any]], arguments: Sequence[Any], upstream: Any
) -> tuple[Any, list[Any], Any]:
    """As :func:`gradients`, of a function that gives its output and what is not differentiated."""
    if keras.config.backend() == "jax":
        import jax

        @jax.jit
        def run(arguments: Any, upstream: Any) -> Any:
            output, pull, state = jax.vjp(function, *arguments, has_aux=True)
            return output, list(pull(upstream)), state

        return run(tuple(arguments), upstream)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(arguments)
            output, state = function(*arguments)
        found = tape.gradient(
            output, list(arguments), upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return output, found, state
    import torch

    nested = any(a.requires_grad for a in arguments)
    leaves = [a if a.requires_grad else a.detach().requires_grad_() for a in arguments]
    output, state = function(*leaves)
    found = torch.autograd.grad(
        output, leaves, upstream, create_graph=nested, allow_unused=True, materialize_grads=True
    )
    return output, list(found), state


@dataclass(frozen=True)
class Step:
    """What one training call of a layer gave, in float64."""

    output: np.ndarray
    x: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    moving_mean: np.ndarray
    moving_variance: np.ndarray


def train(layer: Any, drawn: Drawn, dtype: str) -> Step:
    """One training call of a layer: outputs, gradients, and the moving statistics after it."""
    x = tensor(drawn.x, dtype)
    mask = tensor(drawn.mask, "bool")
    if not layer.built:
        layer.build(drawn.x.shape)
    weights = [w for w in (layer.gamma, layer.beta) if w is not None]
    moving = [v.value for v in layer.non_trainable_variables]

    def call(x: Any, *values: Any) -> tuple[Any, Any]:
        pairs = [(w, v) for w, v in zip(weights, values, strict=True)]
        with keras.StatelessScope(
            state_mapping=[*pairs, *zip(layer.non_trainable_variables, moving, strict=True)]
        ) as scope:
            output = layer(x, training=True, mask=mask)
        after = (layer.moving_mean, layer.moving_variance)
        return output, [scope.get_current_value(v) for v in after]

    upstream = keras.ops.cast(tensor(drawn.gradient, dtype), layer.compute_dtype)
    wide = "float64" if dtype == "float64" else "float32"
    values = [tensor(v, wide) for v in (drawn.gamma, drawn.beta) if v is not None]
    output, found, updated = gradients_and_state(call, [x, *values], upstream)
    if keras.config.backend() == "torch":
        output, found = output.detach(), [f.detach() for f in found]
    by_weight = iter(found[1:])
    return Step(
        array(output),
        array(found[0]),
        array(next(by_weight)) if layer.scale else None,
        array(next(by_weight)) if layer.center else None,
        *(array(u) for u in updated),
    )


def truth(
    drawn: Drawn,
    axis: int,
    epsilon: float = EPSILON,
    momentum: float = 0.99,
    *,
    relu: bool = False,
) -> Step:
    """What :func:`train` must give for a new layer, by the float64 reference."""
    options: dict[str, Any] = {"axis": axis, "epsilon": epsilon, "mask": drawn.mask}
    zeros = np.zeros(drawn.x.shape[axis])
    options["fallback"] = (zeros, zeros + 1)
    forward = reference.forward(drawn.x, drawn.gamma, drawn.beta, **options)
    upstream = drawn.gradient * (forward.output > 0) if relu else drawn.gradient
    backward = reference.backward(upstream, drawn.x, drawn.gamma, **options)
    mean, variance = (
        np.where(forward.count >= least, reference.moving(old, of_batch, momentum), old)
        for least, old, of_batch in (
            (1, zeros, forward.mean),
            (2, zeros + 1, forward.variance),
        )
    )
    return Step(
        np.maximum(forward.output, 0) if relu else forward.output,
        backward.x,
        None if drawn.gamma is None else backward.gamma,
        None if drawn.beta is None else backward.beta,
        mean,
        variance,
    )


def error(found: np.ndarray, true: np.ndarray) -> float:
    """Largest error relative to the largest magnitude; a NaN or infinity is an infinite error."""
    if not found.size:
        return 0.0
    scale = np.abs(true).max()
    worst = np.abs(found - true).max() / (scale if scale > 0 else 1.0)
    return float(worst) if np.isfinite(worst) else float("inf")
