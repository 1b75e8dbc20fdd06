"""Fold a scale and a shift into an ``EinsumDense``, whose equation has a letter for each axis.

Here the bias has one axis for each letter of the output, of length 1 where it does not vary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from truenorm._model.values import as_float64
from truenorm._records.moments import Array


class Letters(NamedTuple):
    """The equation of a built layer.

    Args:
        inputs: A letter per axis of the input, but those of the ellipsis.
        kernel: A letter per axis of the kernel.
        outputs: A letter per axis of the output, but those of the ellipsis.
        before: How many axes an ellipsis at the beginning stands for.
        behind: How many axes an ellipsis at the end stands for.
    """

    inputs: str
    kernel: str
    outputs: str
    before: int
    behind: int

    def of_input(self, axis: int) -> str | None:
        """The letter of an axis of the input, if kernel and bias can take in a map along it."""
        letter = dict(enumerate(self.inputs, self.before)).get(axis)
        summed = {*self.inputs} - {*self.outputs}
        return letter if letter and {letter, *summed} <= {*self.kernel} else None

    def of_output(self, axis: int) -> str | None:
        """The letter of an axis of the output, if the kernel can take in a scale along it."""
        letter = dict(enumerate(self.outputs, self.before)).get(axis)
        return letter if letter and letter in self.kernel else None


def letters_of(layer: Any) -> Letters:
    """The equation of a built layer, taken apart."""
    equation = layer.equation.replace(" ", "")
    inputs, kernel, outputs = equation.replace("->", ",").replace("...", "").split(",")
    elided = layer.input_spec.ndim - len(inputs)
    first = equation.startswith("...")
    return Letters(inputs, kernel, outputs, elided * first, elided * (not first))


def values_of(layer: Any) -> list[Array]:
    """The kernel and the bias of a layer; zero if it has none."""
    kernel, outputs = as_float64(layer.weights[0]), letters_of(layer).outputs
    if layer.bias is None:
        return [kernel, np.zeros([1] * len(outputs))]
    first = min(map(outputs.find, layer.bias_axes))
    bias = as_float64(layer.bias)
    return [kernel, bias.reshape([1] * first + [*bias.shape[: len(outputs) - first]])]


def variables_of(layer: Any, values: list[Array]) -> tuple[list[Array], dict[str, Any]]:
    """The variables of a layer that has these values, and the change of its config."""
    (kernel, bias), letters = values, letters_of(layer)
    known = layer.bias_axes or next(k for k in letters.outputs if k in letters.kernel)
    axes = [k for k, n in zip(letters.outputs, bias.shape, strict=True) if n > 1 or k in known]
    lengths = dict(zip(letters.outputs, bias.shape, strict=True))
    lengths |= dict(zip(letters.kernel, kernel.shape, strict=True))
    full = np.broadcast_to(bias, [lengths[k] if k in axes else 1 for k in letters.outputs])
    first = letters.outputs.find(axes[0])
    shape = [*full.shape[first:], *[1] * letters.behind]
    return [kernel, full.reshape(shape)], {"bias_axes": "".join(axes)}


def with_map_behind(
    layer: Any, values: list[Array], scale: Array, shift: Array, axis: int
) -> list[Array]:
    """Kernel and bias of the layer that does what this one and then the map do."""
    (kernel, bias), letters = values, letters_of(layer)
    letter = letters.of_output(axis) or ""
    scales, shifts = (_along(letter, letters.outputs, vector) for vector in (scale, shift))
    return [kernel * _along(letter, letters.kernel, scale), bias * scales + shifts]


def with_map_before(
    layer: Any, values: list[Array], scale: Array, shift: Array, axis: int
) -> list[Array]:
    """Kernel and bias of the layer that does what the map and then this one do."""
    (kernel, bias), letters = values, letters_of(layer)
    letter = letters.of_input(axis) or ""
    summed = tuple(i for i, k in enumerate(letters.kernel) if k not in letters.outputs)
    added = (kernel * _along(letter, letters.kernel, shift)).sum(axis=summed)
    left = [k for k in letters.kernel if k in letters.outputs]
    order = sorted(left, key=letters.outputs.find)
    added = added.transpose([left.index(k) for k in order])
    lengths = dict(zip(order, added.shape, strict=True))
    added = added.reshape([lengths.get(k, 1) for k in letters.outputs])
    return [kernel * _along(letter, letters.kernel, scale), bias + added]


def _along(letter: str, letters: str, vector: Array) -> Array:
    """The vector along the axis of its letter."""
    return vector.reshape([-1 if k == letter else 1 for k in letters])
