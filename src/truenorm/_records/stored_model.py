"""What a ``.keras`` file says of its BatchNormalization layers, without a model made from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from truenorm._records.rewrite import Left
from truenorm._records.tables import Record, Table, counted, joined, number


@dataclass(frozen=True, repr=False)
class StoredStatistics(Record):
    """A summary of the moving statistics of one layer.

    Args:
        initial: Whether all means are 0 and all variances 1, as in a layer never trained.
        negative: Channels with a variance below 0.
        non_finite: Channels with a mean or variance that is NaN or infinite.
        largest_mean: Largest ``|moving_mean|`` of the finite ones; None if there is none.
        least_variance: Least finite ``moving_variance``; None if there is none.
        largest_variance: Largest finite ``moving_variance``; None if there is none.
    """

    initial: bool
    negative: int
    non_finite: int
    largest_mean: float | None
    least_variance: float | None
    largest_variance: float | None

    def describe(self) -> str:
        """The statistics in a few words, faults first, for a table cell."""
        if self.initial:
            return "as initialised"
        faults = [
            f"{counted(count, 'channel')} {what}"
            for count, what in ((self.non_finite, "not finite"), (self.negative, "negative"))
            if count
        ]
        if self.largest_mean is not None:
            faults.append(f"|mean| up to {number(self.largest_mean)}")
        if self.least_variance is not None:
            least, largest = number(self.least_variance), number(self.largest_variance)
            faults.append(f"variance {least} to {largest}")
        return ", ".join(faults)

    def summary(self) -> str:
        """As :meth:`describe`."""
        return self.describe()

    def tables(self) -> Sequence[Table]:
        """One row per fact."""
        rows = tuple((k, str(v)) for k, v in self.to_dict().items())
        return (Table("moving statistics", ("fact", "value"), rows),)


@dataclass(frozen=True, repr=False)
class StoredLayer(Record):
    """One BatchNormalization layer as a file has it.

    Args:
        path: Where it is: layer names joined by ``/``.
        layer: The class of the layer, with its package: ``keras.BatchNormalization``.
        axis: The axis of the channels, as the configuration has it.
        channels: Number of channels.
        momentum: Weight of the old moving statistics; None where the average is cumulative.
        epsilon: Added to the variance before the root is taken.
        trainable: The layer's own ``trainable``.
        policy: Which part is frozen: ``none``, ``all`` (not trainable), ``statistics``, ``affine``.
        dtype: The name of its dtype policy.
        statistics: Its moving statistics.
        activation: Name of the activation inside the layer; None if there is none.
    """

    path: str
    layer: str
    axis: int
    channels: int
    momentum: float | None
    epsilon: float
    trainable: bool
    policy: str
    dtype: str
    statistics: StoredStatistics
    activation: str | None = None

    def kind(self) -> tuple[object, ...]:
        """Layers of one kind differ in numbers alone; one with a fault is of its own kind."""
        found = self.statistics
        fault = self.path if found.negative or found.non_finite else None
        policy = (self.momentum, self.epsilon, self.policy, self.dtype, self.activation)
        return (self.layer, self.axis, *policy, found.initial, fault)

    def summary(self) -> str:
        """Path and size."""
        return f"'{self.path}': {counted(self.channels, 'channel')}, {self.statistics.describe()}"

    def tables(self) -> Sequence[Table]:
        """One row per fact."""
        rows = tuple((k, str(v)) for k, v in self.to_dict().items())
        return (Table(self.path, ("fact", "value"), rows),)


@dataclass(frozen=True)
class Code:
    """Something in a file that holds code, or asks for code that is neither Keras's nor truenorm's.

    Args:
        path: The layer that it is or is in; the model's name where it is in none.
        what: Its class, and whose code it asks for.
    """

    path: str
    what: str


@dataclass(frozen=True, repr=False)
class StoredModel(Record):
    """Every BatchNormalization layer of a ``.keras`` file, read without making the model.

    Args:
        model: The model's name.
        keras: The version of Keras that wrote the file; None if it does not say.
        saved: When it was written, as it says; None if it does not.
        layers: The BatchNormalization layers, in the order of the configuration.
        hidden: Layers that cannot be looked into, and why.
        code: What holds code (``Lambda`` and the like) or asks for some, nested too.
    """

    model: str
    keras: str | None
    saved: str | None
    layers: tuple[StoredLayer, ...]
    hidden: tuple[Left, ...] = ()
    code: tuple[Code, ...] = ()

    def summary(self) -> str:
        """How many layers."""
        return f"'{self.model}': {counted(len(self.layers), 'layer')}"

    def tables(self) -> Sequence[Table]:
        """One row per layer, or for several that are alike."""
        alike: dict[tuple[object, ...], list[StoredLayer]] = {}
        for layer in self.layers:
            alike.setdefault(layer.kind(), []).append(layer)
        inside = ("inside",) if any(layer.activation for layer in self.layers) else ()
        rows = tuple(_row(layers, inside=bool(inside)) for layers in alike.values())
        columns = ("layer", "of", "axis", "channels", *inside, "momentum", "epsilon", "frozen",
                   "dtype", "moving statistics")  # fmt: skip
        notes = [f"Not looked into: {one.path}, {one.reason}." for one in self.hidden]
        notes += [f"Runs code if it is loaded: {one.path} ({one.what})." for one in self.code]
        if self.keras is not None:
            notes.insert(0, f"Written by Keras {self.keras}, {self.saved or 'no date given'}.")
        notes.insert(0, "Read from the file alone: no model was made, so no mode was observed.")
        title = f"BatchNormalization in the file of {self.summary()}"
        return (Table(title, columns if rows else (), rows, tuple(notes)),)


def _row(layers: Sequence[StoredLayer], *, inside: bool) -> tuple[str, ...]:
    """Layers of one kind, with the range of each number."""
    first, channels = layers[0], sorted(layer.channels for layer in layers)
    return (
        joined([layer.path for layer in layers]),
        first.layer.split(".")[0],
        str(first.axis),
        "–".join(dict.fromkeys((str(channels[0]), str(channels[-1])))),
        *([first.activation or "–"] if inside else []),
        number(first.momentum, 6),
        number(first.epsilon, 6),
        "no" if first.policy == "none" else first.policy,
        first.dtype,
        _all(layer.statistics for layer in layers).describe(),
    )


def _all(found: Iterable[StoredStatistics]) -> StoredStatistics:
    """The statistics of several layers as those of one."""
    every = list(found)
    means, least, largest = (
        [value for one in every if (value := getattr(one, name)) is not None]
        for name in ("largest_mean", "least_variance", "largest_variance")
    )
    return StoredStatistics(
        initial=all(one.initial for one in every),
        negative=sum(one.negative for one in every),
        non_finite=sum(one.non_finite for one in every),
        largest_mean=max(means, default=None),
        least_variance=min(least, default=None),
        largest_variance=max(largest, default=None),
    )
