"""The drawing of learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from truenorm._records.tables import number
from truenorm.report._canvas import INK, MUTED, PAPER, SMALL, colours, number_ticks, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = NDArray[np.float64]
Runs = dict[str, dict[int, Curve]]
"""Per position and seed, the metric after each epoch."""


def curves(
    axes: Axes,
    title: str,
    runs: Runs,
    means: Mapping[str, Curve],
    limits: tuple[float, float],
    narrow: bool,
) -> None:
    """One thick line per position, the seeds behind it, and the names at the lines' ends."""
    from matplotlib.ticker import MaxNLocator

    plain(axes, title, grid="y")
    colour = colours([*runs])
    for position, seeds in runs.items():
        for values in seeds.values() if len(seeds) > 1 else ():
            epochs = np.arange(1, len(values) + 1)
            mark = "o" if len(values) == 1 else "none"
            axes.plot(epochs, values, marker=mark, ms=4, lw=0.9, alpha=0.35, c=colour[position])
    for position, mean in means.items():
        epochs = np.arange(1, len(mean) + 1)
        axes.plot(epochs, mean, color=colour[position], lw=2.4, zorder=3)
        end = np.flatnonzero(np.isfinite(mean))[-1:]
        axes.plot(epochs[end], mean[end], "o", ms=8, c=colour[position], mec=PAPER, zorder=4)
    most = max(len(mean) for mean in means.values())
    axes.set_xlabel("epoch", color=MUTED, fontsize=SMALL)
    axes.set_xlim(*((0.5, 1.5) if most == 1 else (1, most + 0.015 * most)))
    axes.xaxis.set_major_locator(
        MaxNLocator(5 if narrow else 10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axes.set_ylim(*limits)
    number_ticks(axes.yaxis, *limits)
    ends = {p: value for p, mean in means.items() if (value := _last(mean)) is not None}
    names = {p: f"{short(p, 24)}  {number(float(means[p][-1]), 4)}" for p in ends}
    (_legend if narrow else _end_labels)(axes, ends, names, colour)


def _legend(
    axes: Axes, ends: Mapping[str, float], names: Mapping[str, str], colour: Mapping[str, str]
) -> None:
    from matplotlib.lines import Line2D

    order = sorted(ends, key=lambda p: -ends[p])
    axes.get_figure(root=True).legend(  # pyright: ignore[reportOptionalMemberAccess]
        [Line2D([], [], color=colour[p], lw=2.4) for p in order],
        [names[p] for p in order],
        loc="outside upper left",
        frameon=False,
        labelcolor=INK,
        fontsize=SMALL,
        handlelength=1.2,
        borderaxespad=0.2,
    )


def _end_labels(
    axes: Axes, ends: Mapping[str, float], names: Mapping[str, str], colour: Mapping[str, str]
) -> None:
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda p: ends[p])
    line = (high - low) * 18 / 260  # the height of a line of text; the axes are 260 high or more
    places = _spread([ends[p] for p in order], line, low, high)
    for position, place in zip(order, places, strict=True):
        axes.annotate(
            names[position],
            (1, place),
            xytext=(8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour[position],
            annotation_clip=False,
        )


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending values moved apart to at least ``gap``, each as little as the others allow.

    That is isotonic regression of ``value - i * gap``, by pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []
    for i, value in enumerate(values):
        mean, size = value - i * gap, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    top = high - (len(flat) - 1) * gap
    return [min(max(place, low), max(low, top)) + i * gap for i, place in enumerate(flat)]


def _last(values: Curve) -> float | None:
    """The last finite value, if there is one."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None
