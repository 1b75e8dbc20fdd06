"""What a BatchNormalization is to truenorm's tools, be it Keras's or truenorm's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from truenorm._kernels import Tensor, Variable


class BatchNormalizationLike(Protocol):
    """A ``keras.layers.BatchNormalization`` or a subclass of it, built."""

    name: str
    path: str
    trainable: bool
    axis: int
    momentum: float | None
    epsilon: float
    center: bool
    scale: bool
    synchronized: bool | tuple[str, ...]
    renorm: bool
    renorm_clipping: Mapping[str, float | None] | None
    renorm_momentum: float

    gamma: Variable | None
    beta: Variable | None
    moving_mean: Variable
    moving_variance: Variable
    moving_stddev: Variable  # these three only with renorm
    renorm_mean: Variable
    renorm_stddev: Variable

    built: bool
    dtype_policy: Any
    input_spec: Any

    @property
    def compute_dtype(self) -> str:
        """The dtype of the output."""
        ...

    @property
    def weights(self) -> Sequence[Variable]:
        """Gamma, beta and the statistics, in the order of files."""
        ...

    @property
    def variables(self) -> Sequence[Variable]:
        """The same, and whatever state there is besides."""
        ...

    def __call__(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalise."""
        ...

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalise, without what Keras does around it."""
        ...

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        ...
