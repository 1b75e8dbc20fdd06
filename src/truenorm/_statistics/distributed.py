"""Several processes that run the same code: each reads its share, all get the population of all.

What they send each other is float64, bit for bit, and every process merges the parts in the same
order, so all go on with the same numbers. A process that fails says so before it raises, so that
the others do not wait for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from truenorm._errors import DataError
from truenorm._kernels import sums as collecting
from truenorm._records.moments import ROWS, Array, from_rows, to_rows
from truenorm._statistics.runner import Runner
from truenorm._statistics.tally import Pass


class Processes:
    """The processes that collect together; a single one is the common case.

    Args:
        runner: The same model's in each of them.
        data: What each was given.
        shard: Whether that is the same data, of which each takes every n-th batch; None: it is,
            unless a ``DistributedSampler`` has divided it.
    """

    def __init__(self, runner: Runner, data: Any, shard: bool | None) -> None:
        self._rank, self._count = collecting.processes()
        self._slices = runner.slices
        divided = type(getattr(data, "sampler", None)).__name__ == "DistributedSampler"
        self.is_first = self._rank == 0
        self.stride = self._count if (not divided if shard is None else shard) else 1

    def share(self, batches: Iterable[Any]) -> Iterator[Any]:
        """This process's batches."""
        return itertools.islice(batches, self._rank % self.stride, None, self.stride)

    def together(self, read: Callable[[], Pass]) -> Pass:
        """What all of them have read."""
        if self._count == 1:
            return read()
        try:
            own = read()
        except BaseException:  # Ctrl-C included
            collecting.gather(np.full(self._length(), np.nan))
            raise
        parts = collecting.gather(self._packed(own))
        if any(np.isnan(part[0]) for part in parts):
            raise DataError(
                "Another process that collects statistics with this one has failed",
                remedy="see what it says itself",
            )
        merged = self._unpacked(parts[0])
        for part in parts[1:]:
            merged = _merged(merged, self._unpacked(part))
        return merged

    def first_of(self, values: Array) -> Array:
        """The numbers of the first process."""
        if self._count == 1:
            return values
        return collecting.gather(np.ascontiguousarray(values).ravel())[0].reshape(values.shape)

    def _length(self) -> int:
        return 2 + sum(2 + ROWS * (part.stop - part.start) for part in self._slices.values())

    def _packed(self, seen: Pass) -> Array:
        parts: list[Any] = [[seen.samples, seen.batches]]
        order = {path: 1 + index for index, path in enumerate(seen.sites)}
        for path, part in self._slices.items():
            parts.append([order.get(path, 0), seen.calls.get(path, 0)])
            if path in order:
                parts.append(to_rows(seen.sites[path], seen.spread[path]).ravel())
            else:
                parts.append(np.zeros(ROWS * (part.stop - part.start)))
        return np.concatenate(parts, dtype=np.float64)

    def _unpacked(self, vector: Array) -> Pass:
        found: list[tuple[int, str, int, Any]] = []
        start = 2
        for path, part in self._slices.items():
            width = part.stop - part.start
            place, calls = (int(n) for n in vector[start : start + 2])
            end = start + 2 + ROWS * width
            if place:
                rows = vector[start + 2 : end].reshape(ROWS, width)
                found.append((place, path, calls, from_rows(rows)))
            start = end
        found.sort(key=lambda entry: entry[0])
        return Pass(
            {path: both[0] for _, path, _, both in found},
            {path: both[1] for _, path, _, both in found},
            {path: calls for _, path, calls, _ in found},
            int(vector[0]),
            int(vector[1]),
        )


def _merged(a: Pass, b: Pass) -> Pass:
    paths = [*a.sites, *(path for path in b.sites if path not in a.sites)]
    pairs = [(path, [one for one in (a, b) if path in one.sites]) for path in paths]
    return Pass(
        {p: _sum([one.sites[p] for one in some]) for p, some in pairs},
        {p: _sum([one.spread[p] for one in some]) for p, some in pairs},
        {p: max(one.calls[p] for one in some) for p, some in pairs},
        a.samples + b.samples,
        a.batches + b.batches,
    )


def _sum(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
