"""What BatchNormalization did during a training, look by look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from truenorm._records.diagnosis import Finding
from truenorm._records.drawings.curves import Curves, Line
from truenorm._records.drawings.drawing import Drawing, Drawn, Message
from truenorm._records.moments import Array
from truenorm._records.tables import Record, Table, counted, number

QUANTITIES = ("distance", "noise", "gamma", "beta", "dead", "clipped")
"""What is measured of each layer at each look; see :class:`Monitoring`."""


@dataclass(frozen=True)
class Noticed:
    """A finding as it was last, and the epochs (from 0) at whose end it was there."""

    epochs: tuple[int, ...]
    finding: Finding


@dataclass(frozen=True, eq=False, repr=False)
class Monitoring(Record, Drawn):
    """What every BatchNormalization did during a training.

    A *look* is at two steps in a row. Of each look and layer ``values`` has, in arrays of the shape
    ``(looks, layers)``, NaN where it is not known:

    - ``distance``: how far an output normalised with the moving statistics is from one normalised
      with the batch's, over the latter (root mean square): 0 is equal, 1 as large as the output.
    - ``noise``: the standard deviation of the batch means, in standard deviations of the values.
    - ``gamma``, ``beta``: root mean square over the channels.
    - ``dead``: share of the channels that are constant: next to no gamma, or no variance.
    - ``clipped``: share of the channels whose correction ``renorm`` has clipped.

    Args:
        model: The model's name.
        layers: Path of every layer, in the order of the columns.
        channels: Channels of every layer.
        epochs: Of each look, counted from 0 as Keras does.
        steps: Steps of this training at the end of each look.
        values: Arrays by the names above.
        modes: Of each look and layer, what it has done since the look before, as seen by what it
            changed: which statistics normalised, whether the moving ones were updated, whether
            gamma and beta learned.
        findings: What the rules of :func:`truenorm.diagnose` found at the ends of epochs.
    """

    model: str
    layers: tuple[str, ...]
    channels: tuple[int, ...]
    epochs: tuple[int, ...]
    steps: tuple[int, ...]
    values: Mapping[str, Array]
    modes: tuple[tuple[str, ...], ...]
    findings: tuple[Noticed, ...] = ()

    def summary(self) -> str:
        """How many layers and looks, and how many findings."""
        looks = f"{counted(len(self.layers), 'layer')}, {counted(len(self.epochs), 'look')}"
        found = f", {counted(len(self.findings), 'finding')}" if self.findings else ""
        return f"of '{self.model}': {looks}{found}"

    def overall(self, epoch: int | None = None) -> dict[str, float]:
        """One number of each quantity, of an epoch's looks or of the latest.

        Of ``distance`` and ``noise`` it is that of the worst layer; of ``gamma`` and ``beta`` the
        root mean square, of ``dead`` and ``clipped`` the share, of all channels of the model.
        """
        looks = [i for i, one in enumerate(self.epochs) if one == epoch]
        if epoch is None or not looks:  # with a long period an epoch may have none
            looks = [len(self.epochs) - 1] if self.epochs else []
        return {name: self._over_layers(name, self.values[name][looks]) for name in QUANTITIES}

    def _over_layers(self, name: str, values: Array) -> float:
        known = np.isfinite(values)
        counts = known * np.asarray(self.channels, np.float64)
        if not known.any():
            return float("nan")
        values = np.where(known, values, 0.0)
        if name in ("distance", "noise"):
            looks = np.maximum(known.sum(axis=0), 1)
            return float((values.sum(axis=0) / looks).max())
        power = 2 if name in ("gamma", "beta") else 1
        return float(((values**power * counts).sum() / counts.sum()) ** (1 / power))

    def drawing(self) -> Drawing:
        """How far each layer's moving statistics were from the batch's, over the steps."""
        title = f"Moving statistics against the batch's in '{self.model}'"
        distances = self.values["distance"]
        if not np.isfinite(distances).any():
            text = "No distance is known."
            return Message(title=title, alt=text, text=text)
        lines = {
            path: Line.of(self.steps, distances[:, column])
            for column, path in enumerate(self.layers)
        }
        ends = (f"{path} {number(line.last)}" for path, line in lines.items())
        return Curves(
            title=title,
            alt=f"The last distances: {', '.join(ends)}.",
            notes=("0: equal; 1: an output differs by as much as it is large.",),
            lines=lines,
            unit="distance",
            time="step",
        )

    def tables(self) -> Sequence[Table]:
        """The latest look, one row per layer; and the findings, one row per code and layer."""
        if not self.epochs:
            return (Table(f"BatchNormalization in '{self.model}': not looked at yet", (), ()),)
        rows = tuple(
            (path, *(_cell(self.values[name][-1][column]) for name in QUANTITIES), mode)
            for column, (path, mode) in enumerate(zip(self.layers, self.modes[-1], strict=True))
        )
        title = (
            f"BatchNormalization in '{self.model}' in epoch {self.epochs[-1] + 1}, after "
            f"{self.steps[-1]} steps (look {len(self.epochs)})"
        )
        latest = Table(title, ("layer", *QUANTITIES, "mode"), rows, (_LEGEND,))
        return (latest, self._noticed()) if self.findings else (latest,)

    def _noticed(self) -> Table:
        rows = tuple(
            (
                f"{one.finding.code} {one.finding.severity}",
                one.finding.problem,
                one.finding.site,
                _spans(one.epochs),
            )
            for one in self.findings
        )
        return Table("Found meanwhile", ("code", "problem", "site", "epochs"), rows)


_LEGEND = (
    "distance: of an output with the moving statistics from one with the batch's, 1 is as large as "
    "it; noise: of batch means, in standard deviations; gamma, beta: root mean square; dead, "
    "clipped: shares of the channels; mode: as seen by what the layer has changed."
)


def _spans(epochs: Sequence[int]) -> str:
    """Epochs as a reader counts them: 1–3, 7."""
    spans: list[list[int]] = []
    for epoch in epochs:
        if spans and epoch == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], epoch]
        else:
            spans.append([epoch])
    return ", ".join("–".join(str(epoch + 1) for epoch in span) for span in spans)


def _cell(value: float) -> str:
    return number(float(value) if np.isfinite(value) else None)
