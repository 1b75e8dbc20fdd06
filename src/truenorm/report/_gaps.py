"""The drawing of how far moving statistics are off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from truenorm._records.recalibration import Gap
from truenorm._records.tables import printable
from truenorm.report._canvas import FAINT, INK, MUTED, PAPER, colours, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TINY = 1e-8  # a gap below it is rounding of float32, and drawn at zero


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
