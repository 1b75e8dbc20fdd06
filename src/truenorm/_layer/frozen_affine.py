"""A BatchNormalization whose statistics are fixed, as a layer: a scale and shift per channel."""

from __future__ import annotations

from typing import Any

import keras

from truenorm import _kernels as kernels
from truenorm._kernels import Tensor
from truenorm._layer.lean_call import LeanCall

ops: Any = keras.ops


@keras.saving.register_keras_serializable(package="truenorm")
class FrozenAffine(LeanCall):
    r"""A scale and a shift per channel that never learn, the same in training and in inference.

    .. math:: y = \text{scale}\,(x - \text{center}) + \text{shift}

    (The center is taken off first: where it is much larger than what varies around it, a scale and
    a shift alone would lose digits.) It is not a BatchNormalization: no batch, no statistics, and
    nothing that a parent could make trainable.

    Args:
        axis: Index of the channel axis.
        **kwargs: ``name``, ``dtype``, ``trainable``.
    """

    center: Any
    scale: Any
    shift: Any

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """One value per channel of each."""
        dtype = kernels.statistics_dtype(keras.backend.standardize_dtype(self.variable_dtype))
        for name, start in (("center", "zeros"), ("scale", "ones"), ("shift", "zeros")):
            weight = self.add_weight(
                (input_shape[self.axis],),
                start,
                dtype=dtype,
                trainable=False,
                autocast=False,
                name=name,
            )
            setattr(self, name, weight)
        self.input_spec = keras.layers.InputSpec(
            ndim=len(input_shape), axes={self.axis: input_shape[self.axis]}
        )

    def call(self, inputs: Tensor) -> Tensor:
        """The map, in float32 at least."""
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        center, scale, shift = (
            ops.reshape(weight, shape) for weight in (self.center, self.scale, self.shift)
        )
        wide = ops.cast(inputs, center.dtype)
        return ops.cast(scale * (wide - center) + shift, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "axis": self.axis}
