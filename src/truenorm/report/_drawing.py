"""How the charts are painted, with matplotlib's objects only (no global state of pyplot)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from truenorm._records.recalibration import Gap
from truenorm._records.study import Comparison
from truenorm._records.tables import number, printable
from truenorm.report._canvas import (
    FAINT,
    GRID,
    INK,
    MUTED,
    PAPER,
    SMALL,
    colours,
    numbers,
    plain,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = NDArray[np.float64]
Runs = dict[str, dict[int, Curve]]
"""Per position and seed, the metric after each epoch."""

_TINY = 1e-8  # a gap below it is rounding of float32, and drawn at zero


def last(values: Curve) -> float | None:
    """The last finite value, if there is one."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def margins(low: float, high: float) -> tuple[float, float]:
    """An axis's ends, a little outside the values'."""
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


# --- learning curves ----------------------------------------------------------------------------


def curves(
    axes: Axes,
    title: str,
    runs: Runs,
    means: Mapping[str, Curve],
    limits: tuple[float, float],
    narrow: bool,
    bands: Mapping[str, tuple[Curve, Curve]],
) -> None:
    """One thick line per position, its band or the seeds behind it, and names at the ends."""
    from matplotlib.ticker import MaxNLocator

    plain(axes, title, grid="y")
    colour = colours([*runs])
    for position, seeds in runs.items():
        if position in bands:
            low, high = bands[position]
            epochs = np.arange(1, len(low) + 1)
            axes.fill_between(epochs, low, high, color=colour[position], alpha=0.18, lw=0)
            continue
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
    numbers(axes.yaxis, *limits)
    ends = {p: value for p, mean in means.items() if (value := last(mean)) is not None}
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


# --- comparison ---------------------------------------------------------------------------------


def values(axes: Axes, title: str, ends: Mapping[str, Mapping[int, float]], width: float) -> None:
    """A column of dots per position; the dots of one seed are joined, so that pairs are seen."""
    letters = int(max(28, min(80, width / len(ends))) / 7)
    plain(axes, title, grid="y")
    colour = colours([*ends])
    columns = {position: x for x, position in enumerate(ends)}
    for seed in sorted({seed for row in ends.values() for seed in row}):
        having = [p for p in ends if seed in ends[p]]
        axes.plot(
            [columns[p] for p in having], [ends[p][seed] for p in having], color=FAINT, lw=1.1
        )
    for position, x in columns.items():
        ys = [*ends[position].values()]
        axes.plot([x] * len(ys), ys, "o", ms=7, c=colour[position], mec=PAPER, zorder=3)
        if len(ys) > 1:
            mean = math.fsum(ys) / len(ys)
            axes.plot([x - 0.2, x + 0.2], [mean, mean], color=colour[position], lw=2.4, zorder=4)
    everything = [y for row in ends.values() for y in row.values()]
    limits = margins(min(everything), max(everything))
    axes.set_ylim(*limits)
    numbers(axes.yaxis, *limits)
    axes.set_xlim(-0.5, len(ends) - 0.5)
    axes.set_xticks(range(len(ends)), [""] * len(ends))
    for position, x in columns.items():
        # Line by line: only single lines are centred by the browser, with its own font.
        for line, part in enumerate(_halves(position)):
            _below(axes, x, line, short(part, letters), "center", INK)


def _below(axes: Axes, x: float, line: float, text: str, align: str, color: str) -> None:
    axes.annotate(
        text,
        (x, 0),
        xytext=(0, -8 - 15 * line),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha=align,
        va="top",
        color=color,
        fontsize=SMALL,
        annotation_clip=False,
    )


def _halves(name: str) -> tuple[str, ...]:
    """A long name on two lines, broken behind an underscore: ``before_`` and ``activation``."""
    head, mark, tail = name.partition("_")
    return (head + mark, tail) if tail and len(name) > 8 else (name,)


def differences(axes: Axes, pairs: Sequence[Comparison], margin: float | None) -> None:
    """A forest plot: per pair the mean difference, its interval, and the line of no difference.

    With a margin, the band of differences that are of no interest, and the 90% interval that
    decides whether the difference lies in it.
    """
    plain(axes, "paired difference, same seeds", grid="x")
    ends = [0.0]
    if margin is not None:
        axes.axvspan(-margin, margin, color=GRID, lw=0, zorder=0)
        ends += [-margin, margin]
    for row, pair in enumerate(pairs):
        value = pair.difference
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [row, row], color=INK, lw=2)
            ends += [value.low, value.high]
        if pair.narrow is not None:
            axes.plot([pair.narrow.low, pair.narrow.high], [row, row], color=INK, lw=5, zorder=2)
        ends.append(value.mean)
        shown = pair.p_adjusted is not None and pair.p_adjusted < 0.05
        axes.plot(
            value.mean, row, "o", ms=9, mew=2, color=INK, mfc=INK if shown else PAPER, zorder=3
        )
        axes.annotate(
            f"{short(pair.first, 20)} − {short(pair.second, 20)}",
            (0, row),
            xytext=(0, 14),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
            bbox=None if margin else {"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )
    limits = margins(min(ends), max(ends))
    axes.axvline(0, color=MUTED, lw=1.2, zorder=1)
    axes.set_xlim(*limits)
    axes.set_ylim(len(pairs) - 0.5, -0.75)
    axes.set_yticks([])
    _below(axes, limits[0], 1.2, "← second is higher", "left", MUTED)
    _below(axes, limits[1], 1.2, "first is higher →", "right", MUTED)
    numbers(axes.xaxis, *limits)


# --- gaps ---------------------------------------------------------------------------------------


def gaps(figure: Figure, before: Sequence[Gap], after: Sequence[Gap | None], narrow: bool) -> None:
    """Two panels, one row per layer: where its statistics were and where they are."""
    panels = figure.subplots(
        *((2, 1) if narrow else (1, 2)), gridspec_kw={"wspace": 0.06, "hspace": 0.04}
    )
    names = [_ending(g.path, 20 if narrow else 36) for g in before]
    for axes, title, field in (
        (panels[0], "mean off by (standard deviations)", "mean"),
        (panels[1], "scale off by (doublings)", "scale"),
    ):
        plain(axes, title, grid="x")
        _dumbbells(
            axes,
            [getattr(g, field) for g in before],
            [None if g is None else getattr(g, field) for g in after],
        )
        axes.set_ylim(len(before) - 0.4, -0.6)
        labelled = narrow or axes is panels[0]
        axes.set_yticks(range(len(before)), names if labelled else [""] * len(before), color=INK)


def _ending(path: str, most: int) -> str:
    """The end of a long path: there it says which layer it is."""
    path = printable(path)
    return path if len(path) <= most else "…" + path[1 - most :]


def _dumbbells(axes: Axes, before: Sequence[float], after: Sequence[float | None]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    seen = [abs(v) for v in (*before, *after) if v is not None and math.isfinite(v)]
    large = [v for v in seen if v >= _TINY]
    bottom = math.floor(math.log10(min(large, default=0.1)))
    top = max(math.ceil(math.log10(max(large, default=1.0))), bottom + 1)
    axes.set_xscale("symlog", linthresh=10.0**bottom, linscale=0.6)
    step = math.ceil((top - bottom + 1) / 5)
    ticks = [0.0, *(10.0**k for k in range(top, bottom - 1, -step))]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.set_xlim(-0.25 * 10.0**bottom, 10.0**top * 1.25)
    axes.axvline(0, color=MUTED, lw=1.2, zorder=1)
    for row, (was, now) in enumerate(zip(before, after, strict=True)):
        there = [abs(v) for v in (was, now) if v is not None and math.isfinite(v)]
        axes.plot(there, [row] * len(there), color=FAINT, lw=2, zorder=2)
        if math.isfinite(was):
            axes.plot(abs(was), row, "o", ms=7.5, mew=1.8, color=_BEFORE, mfc=PAPER, zorder=3)
        if now is not None and math.isfinite(now):
            axes.plot(abs(now), row, "o", ms=7.5, color=_AFTER, mec=PAPER, zorder=4)


def _power(value: float) -> str:
    """A power of ten in few characters: ``0.01``, ``10``, ``10⁻⁶``."""
    if value == 0 or 1e-3 <= value < 1e4:
        return f"{value:g}"
    return "10" + str(round(math.log10(value))).translate(
        str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    )


_BEFORE, _AFTER = colours(["after_activation", "before_activation"]).values()
