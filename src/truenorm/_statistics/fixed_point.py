r"""Population statistics upstream: what every layer sees once all layers use these statistics.

Let :math:`F(u)` be the moments that a pass over the data sees while the layers use the statistics
:math:`u`. Sought is :math:`u = F(u)`. A layer depends only on those called before it, so one pass
per layer would do, and nothing else is certain: putting :math:`F(u)` for :math:`u` everywhere at
once blows up, because a layer that uses statistics of other inputs than it gets passes on other
scales, and so on through the depth.

Batch statistics do not blow up: they follow the inputs. So a small sample :math:`S` of the data,
one batch, predicts how all statistics move together, and the passes only correct it. With
:math:`F_S` for the moments of the sample, and :math:`r` for how those of the data relate to them
(the offset of the mean in standard deviations, the factor of the variance):

.. math:: r_k = F(u_k) : F_S(u_k), \qquad u_{k+1} = F_S(u_{k+1}) \cdot r_k ,

where the second equation is one run of the sample whose layers normalise with its own batch
statistics, moved by :math:`r_k`. Of the error remains a share of the order of the difference
between sample and data. Layers that are settled, in the order of their calls, stay as they are, and
the first that is not settles in each pass: there are never more passes than layers, plus two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from truenorm._records.moments import Array, Moments
from truenorm._statistics.runner import Runner, Use
from truenorm._statistics.tally import Pass

TOLERANCE = {"float64": 2e-6, "float32": 2e-6, "float16": 2e-4, "bfloat16": 2e-3}
"""Difference (of a mean in standard deviations, of a variance relative to it) that is rounding, by
the layer's compute dtype."""

_LEAST = 1e-6
"""Share of the data's variance below which the sample's says nothing of a channel."""


class Sample:
    """Some batches as large as the first one, each sample of the data as likely as any other.

    Args:
        batches: How many.
    """

    def __init__(self, batches: int = 1) -> None:
        self._random = np.random.default_rng(0)
        self._wanted = batches
        self._rows: list[list[Any]] = []
        self._structure: Any = None
        self._seen = self._size = 0

    def drawn_from(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Hand the batches on, and draw from them."""
        for batch in batches:
            self.draw(batch)
            yield batch

    def draw(self, batch: Any) -> None:
        """Draw from one batch more (Vitter's algorithm R)."""
        leaves = [np.asarray(keras.ops.convert_to_numpy(a)) for a in keras.tree.flatten(batch)]
        size = len(leaves[0])
        if self._structure is None and size:
            self._structure, self._size = batch, size
        for index in range(size):
            place = self._seen
            if self._seen >= self._wanted * self._size:
                place = int(self._random.integers(0, self._seen + 1))
            self._seen += 1
            if place < self._wanted * self._size:
                self._put(place, [np.array(leaf[index]) for leaf in leaves])

    def _put(self, place: int, row: list[Any]) -> None:
        shapes = [value.shape for value in row]
        if not self._rows or shapes == [value.shape for value in self._rows[0]]:
            self._rows[place : place + 1] = [row]

    def batches(self) -> list[Any]:
        """The samples, mixed, in the structure of the model's inputs; none of no data."""
        order = self._random.permutation(len(self._rows))
        return [
            keras.tree.pack_sequence_as(
                self._structure,
                [np.stack(column) for column in zip(*(self._rows[i] for i in part), strict=True)],
            )
            for part in np.split(order, range(self._size, len(order), max(self._size, 1)))
            if len(part)
        ]


def settle(
    runner: Runner,
    one_pass: Callable[[Use, Sample | None], Pass],
    first_of: Callable[[Array], Array],
) -> tuple[Pass, int, float]:
    """The settled statistics as seen, how many passes it took, and the largest difference left.

    Args:
        runner: For the runs of the sample.
        one_pass: One pass over the data, of all processes together.
        first_of: The numbers that the first of all processes has: all use the same statistics.
    """

    def run(batch: Any, use: Use) -> tuple[Array, Array]:
        return _flat(runner, runner.one_pass(batch, use))

    sample = Sample()
    use = Use.own(runner.channels)
    seen, passes = one_pass(use, sample), 1
    order = list(seen.sites)
    batch = sample.batches()
    alike = [path for path in order if seen.calls[path] == 1]
    settled: list[str] = []
    difference = dict.fromkeys(order, np.inf)
    least = tolerance = max(TOLERANCE[layer.compute_dtype] for layer in runner.layers)
    data, own = _flat(runner, seen), run(batch, use)
    while len(settled) < len(order) and passes < len(order) + 2:
        moved = _moved(runner, use, data, own, set(alike) - set(settled), settled)
        found = run(batch, moved)
        mean = np.where(moved.given, moved.mean, found[0] + moved.mean * np.sqrt(found[1]))
        variance = np.where(moved.given, moved.variance, found[1] * moved.variance)
        mean, variance = first_of(np.stack([mean, variance]))
        use = Use(np.ones(runner.channels, bool), mean, variance)
        seen, passes = one_pass(use, None), passes + 1
        data, own = _flat(runner, seen), run(batch, use)
        difference = {path: _difference(runner, path, use, data) for path in order}
        if passes == 2:
            # Nothing is upstream of the first: if it sees something else, the data is random.
            tolerance = max(least, 4 * difference[order[0]])
        settled = _settled(order, difference, tolerance)
    sites = {
        path: Moments(m.count, use.mean[part], use.variance[part] * m.count)
        for path, m in seen.sites.items()
        for part in (runner.slices[path],)
    }
    final = Pass(sites, seen.spread, seen.calls, seen.samples, seen.batches)
    return final, passes, max(difference.values(), default=0.0)


def _moved(
    runner: Runner,
    use: Use,
    data: tuple[Array, Array],
    own: tuple[Array, Array],
    free: set[str],
    settled: list[str],
) -> Use:
    """The sample's own statistics, moved as those of the data relate to them.

    Given instead: the statistics of layers that are settled; and, where the sample cannot tell
    (constant channels, layers called more than once), those of the data as they are.
    """
    (mean, variance), (own_mean, own_variance) = data, own
    follows = own_variance > _LEAST * variance
    mean, variance = mean.copy(), variance.copy()
    for path, part in runner.slices.items():
        if path not in free:
            follows[part] = False
        if path in settled:
            mean[part], variance[part] = use.mean[part], use.variance[part]
    unit = np.where(follows, own_variance, 1.0)
    return Use(
        ~follows,
        np.where(follows, (mean - own_mean) / np.sqrt(unit), mean),
        np.where(follows, variance / unit, variance),
    )


def _flat(runner: Runner, seen: Pass) -> tuple[Array, Array]:
    """Means and variances of all layers side by side; zeros for one that is not called."""
    mean, variance = np.zeros(runner.channels), np.zeros(runner.channels)
    for path, moments in seen.sites.items():
        part = runner.slices[path]
        mean[part], variance[part] = moments.mean, moments.variance
    return mean, variance


def _difference(runner: Runner, path: str, use: Use, data: tuple[Array, Array]) -> float:
    part = runner.slices[path]
    mean, variance = data[0][part], data[1][part]
    # A channel of which epsilon alone decides is not waited for.
    unit = variance + 1e-3 * runner.epsilons[path]
    unit = np.where(unit > 0, unit, 1.0)
    shift = np.abs(use.mean[part] - mean) / np.sqrt(unit)
    scale = np.abs(use.variance[part] - variance) / unit
    return float(np.maximum(shift, scale).max(initial=0.0))


def _settled(order: list[str], difference: dict[str, float], tolerance: float) -> list[str]:
    """The layers before the first one that is not settled yet."""
    first = next((i for i, path in enumerate(order) if not difference[path] <= tolerance), None)
    return order[:first]
