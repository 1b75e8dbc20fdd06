"""One place where a BatchNormalization is called in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truenorm._records.tables import Record, Table, counted


@dataclass(frozen=True, repr=False)
class Site(Record):
    """One place where a BatchNormalization is called in a model.

    Args:
        path: Where it is: layer names joined by ``/``; ``#2`` is the second call of a shared layer.
        layer: The class of the layer, with its package: ``keras.BatchNormalization``.
        producer: What makes its input, as ``Class name``; None where no graph shows it.
        consumers: What takes its output, each as ``Class name``.
        position: ``before_activation``, ``after_activation``, ``before_layer``, or None where it
            is none of these (before an Add, a pooling, the output) or not known.
        axis: The axis of the channels, as an index from the left.
        channels: Number of channels.
        momentum: Weight of the old moving statistics.
        epsilon: Added to the variance before the root is taken.
        trainable: The layer's own ``trainable``, as it is in effect.
        policy: The freeze policy in effect: ``none``, ``all``, ``statistics`` or ``affine``.
        activation: Name of the activation inside the layer; None if there is none.
        adds: Whether it is called with a tensor to add, before that activation.
    """

    path: str
    layer: str
    producer: str | None
    consumers: tuple[str, ...]
    position: str | None
    axis: int
    channels: int
    momentum: float | None
    epsilon: float
    trainable: bool
    policy: str
    activation: str | None = None
    adds: bool = False

    def inside(self) -> str:
        """What the layer does behind its normalisation, for a table cell."""
        return " and ".join([*["add"] * self.adds, *filter(None, (self.activation,))])

    def summary(self) -> str:
        """Path, position and size."""
        where = "" if self.position is None else f"{self.position}, "
        return f"'{self.path}': {where}{counted(self.channels, 'channel')}"

    def tables(self) -> Sequence[Table]:
        """One row per fact."""
        return (
            Table(
                self.path, ("fact", "value"), tuple((k, str(v)) for k, v in self.to_dict().items())
            ),
        )
