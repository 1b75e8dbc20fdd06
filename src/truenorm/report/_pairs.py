"""The drawings that compare positions: the value of each seed, and the paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from truenorm._records.study import Comparison
from truenorm.report._canvas import (
    FAINT,
    INK,
    MUTED,
    PAPER,
    SMALL,
    colours,
    margins,
    number_ticks,
    plain,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    number_ticks(axes.yaxis, *limits)
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


def differences(axes: Axes, pairs: Sequence[Comparison]) -> None:
    """A forest plot: per pair the mean difference, its interval, and the line of no difference."""
    plain(axes, "paired difference, same seeds", grid="x")
    ends = [0.0]
    for row, pair in enumerate(pairs):
        value = pair.difference
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [row, row], color=INK, lw=2)
            ends += [value.low, value.high]
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
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )
    limits = margins(min(ends), max(ends))
    axes.axvline(0, color=MUTED, lw=1.2, zorder=1)
    axes.set_xlim(*limits)
    axes.set_ylim(len(pairs) - 0.5, -0.75)
    axes.set_yticks([])
    _below(axes, limits[0], 1.2, "← second is higher", "left", MUTED)
    _below(axes, limits[1], 1.2, "first is higher →", "right", MUTED)
    number_ticks(axes.xaxis, *limits)
