"""What all charts share: the colours, the shape of the axes, and the way to a stand-alone SVG.

Charts are drawn twice, for a wide page and for a phone, so that their text has the same size on
both. Text stays text in the page's own fonts; it is laid out with the metrics of DejaVu Sans, which
is wider than the system fonts that replace it, so nothing overlaps. The SVG carries its own dark
colours: as an image it cannot take them from the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truenorm._errors import MissingDependencyError
from truenorm._records.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, FAINT, GRID, PAPER = "#1b2027", "#58616d", "#b4bbc5", "#e6e9ed", "#ffffff"
WIDE, NARROW = 880, 360
TEXT, SMALL = 13.0, 12.0

# Each stays apart from the others for the common colour deficiencies, and reads as text on paper.
_POSITIONS = {
    "before_activation": "#0a4f9c",
    "after_activation": "#c75000",
    "before_layer": "#00806a",
    "none": "#39404a",
}
_OTHERS = ("#9b3d90", "#7d6608", "#a3213b", "#3b3f8f")

# The page's dark paper is the same as that of page.css.
_DARK = {
    INK: "#e8ebf0",
    MUTED: "#a2abb8",
    FAINT: "#566070",
    GRID: "#2b313a",
    PAPER: "#14171c",
    "#0a4f9c": "#5fa6ee",
    "#c75000": "#f7975a",
    "#00806a": "#63dcc1",
    "#39404a": "#838c98",
    "#9b3d90": "#dc92d3",
    "#7d6608": "#d2b64a",
    "#a3213b": "#f08c9e",
    "#3b3f8f": "#9aa0f0",
}
_FONTS = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "truenorm",
    "text.usetex": False,
    # A name with dollar signs is a name, not a formula.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": TEXT,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """A drawing for the report, with the words that stand for it.

    Args:
        title: What is drawn; shown above the chart.
        alt: What the chart shows, for those who do not see it.
        svg: The drawing, a whole SVG document.
        narrow: The same for a phone's width; empty where ``svg`` serves both.
        notes: Sentences below the chart: how to read it, and what is missing from it.
    """

    title: str
    alt: str
    svg: str
    narrow: str = ""
    notes: tuple[str, ...] = ()


def render(paint: Callable[[Figure, bool], None], wide: float, narrow: float) -> tuple[str, str]:
    """Paint the wide and the narrow drawing.

    Args:
        paint: Draws into an empty figure; told whether it is the narrow one.
        wide: Height of the wide drawing, in pixels.
        narrow: Height of the narrow drawing, in pixels.

    Returns:
        Two SVG documents.
    """
    return _svg(paint, WIDE, wide, small=False), _svg(paint, NARROW, narrow, small=True)


def _svg(paint: Callable[[Figure, bool], None], width: float, height: float, small: bool) -> str:
    try:
        from matplotlib import rc_context, style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "A chart needs matplotlib, which is not installed",
            remedy='pip install "truenorm[report]"',
        ) from error
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The user's own style and matplotlibrc must not change a report.
    with style.context("default"), rc_context(_RC), warnings.catch_warnings():
        # The browser finds the glyphs that DejaVu Sans lacks.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*", category=UserWarning)
        figure = Figure((width / 72, height / 72), dpi=72, layout="constrained", facecolor=PAPER)
        paint(figure, small)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=nothing, facecolor=PAPER)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', text, count=2)
    head, body = text.split(">", 1)
    return f"{head}>\n<style>{_stylesheet()}</style>{body}"


def _stylesheet() -> str:
    dark = "".join(
        f'[style*="{what}: {light}"]{{{what}:{colour}!important}}'
        for light, colour in _DARK.items()
        for what in ("fill", "stroke")
    )
    return (
        f"text{{font-family:{_FONTS}!important;font-variant-numeric:tabular-nums}}"
        f"@media (prefers-color-scheme:dark){{{dark}}}"
    )


def colours(positions: Sequence[str]) -> dict[str, str]:
    """A colour for each position: always the same for the known ones, by order for others."""
    others = [p for p in positions if p not in _POSITIONS]
    return {
        p: _POSITIONS[p] if p in _POSITIONS else _OTHERS[others.index(p) % len(_OTHERS)]
        for p in positions
    }


def short(name: str, most: int) -> str:
    """The name as plain text of at most ``most`` characters; both ends are kept."""
    name = printable(name)
    if len(name) <= most:
        return name
    head = (most - 1) // 3
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def plain(axes: Axes, title: str, grid: str) -> None:
    """Quiet axes: a title instead of a turned label, and a grid along ``grid`` only."""
    axes.set_title(title, loc="left", fontsize=TEXT, color=INK, pad=10)
    axes.set_facecolor(PAPER)
    axes.grid(visible=True, axis="x" if grid == "x" else "y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=MUTED, pad=6)


def margins(low: float, high: float) -> tuple[float, float]:
    """An axis's ends, a little outside the values'."""
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def number_ticks(axis: Axis, low: float, high: float, most: int = 6) -> None:
    """Tick labels as plain numbers with equal decimals, and without an offset in the corner."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    axis.set_major_locator(MaxNLocator(most - 1, steps=[1, 2, 2.5, 5, 10]))
    if 1e-4 < high - low < 1e6:
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_scientific(False)
        axis.set_major_formatter(formatter)
    else:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def message(figure: Figure, text: str) -> None:
    """Say why there is no chart."""
    figure.text(0.5, 0.5, text, ha="center", va="center", color=MUTED)
