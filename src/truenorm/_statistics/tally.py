"""What runs of a model saw, added up: one long row of all layers' channels, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import keras
import numpy as np

from truenorm._records.moments import Array, Moments, Spread

if TYPE_CHECKING:
    from truenorm._statistics.runner import Run


@dataclass(frozen=True)
class Pass:
    """What one pass over the data saw.

    Args:
        sites: Moments per layer path, in the order of the first call.
        spread: How much the batches differ, per layer path.
        calls: How often each layer was called per batch, at most.
        samples: Samples seen.
        batches: Batches seen.
    """

    sites: Mapping[str, Moments]
    spread: Mapping[str, Spread]
    calls: Mapping[str, int]
    samples: int
    batches: int


class Tally:
    """Adds runs up.

    Args:
        slices: Which channels of the row are those of a layer, by its path.
    """

    def __init__(self, slices: Mapping[str, slice]) -> None:
        self._slices = slices
        self._channels = max((part.stop for part in slices.values()), default=0)
        self._times: dict[str, int] = {}
        self._total = Moments.zero(self._channels)
        self._spread = Spread.of(self._total)
        self._turns: list[Moments] = []
        self._samples = self._batches = 0

    def add(self, run: Run) -> None:
        """One run more."""
        sums = np.asarray(keras.ops.convert_to_numpy(run.sums), np.float64)
        turns = self._by_turn(run.calls, np.concatenate([sums, *run.told], axis=1))
        batch = Moments.zero(self._channels)
        for index, moments in enumerate(turns):
            batch = batch.merge(moments)
            if index < len(self._turns):
                moments = self._turns[index].merge(moments)
            self._turns[index : index + 1] = [moments]
        self._total = self._total.merge(batch)
        self._spread = self._spread.merge(Spread.of(batch))
        self._samples, self._batches = self._samples + run.samples, self._batches + 1
        times = Counter(run.calls)
        for path in run.order:
            if path in times:
                self._times[path] = max(self._times.get(path, 0), times[path])

    def seen(self) -> Pass:
        """What all of them saw."""
        parts = {path: self._slices[path] for path in self._times}
        return Pass(
            {path: self._total[part] for path, part in parts.items()},
            {path: self._spread[part] for path, part in parts.items()},
            dict(self._times),
            self._samples,
            self._batches,
        )

    def turns(self) -> dict[str, tuple[Moments, ...]]:
        """Per layer path the moments of its first call in each batch, of its second, and so on."""
        return {
            path: tuple(turn[self._slices[path]] for turn in self._turns[:times])
            for path, times in self._times.items()
        }

    def _by_turn(self, calls: tuple[str, ...], sums: Array) -> list[Moments]:
        """The moments of the first call of each layer, those of the second, and so on."""
        rows: list[Array] = []
        turn_of: Counter[str] = Counter()
        start = 0
        for path in calls:
            turn, part = turn_of[path], self._slices[path]
            if turn == len(rows):
                rows.append(np.zeros((4, self._channels)))
            end = start + part.stop - part.start
            rows[turn][:, part] = sums[:, start:end]
            start = end
            turn_of[path] += 1
        return [Moments.from_sums(*row) for row in rows]
