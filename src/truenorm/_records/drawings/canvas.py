"""What all drawings paint on: Axes, the colours, and the few things that they all do with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from truenorm._records.drawings.theme import Theme, colours
from truenorm._records.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Side = Literal["x", "y"]


@dataclass(frozen=True)
class Canvas:
    """Axes to paint on.

    Args:
        axes: The Axes.
        theme: The colours.
        title: What is drawn; None where a caption says it, as in a report.
        narrow: Whether it is as narrow as a phone.
        width: Roughly how wide it is, in the pixels of a report.
    """

    axes: Axes
    theme: Theme
    title: str | None = None
    narrow: bool = False
    width: float = 800

    @property
    def small(self) -> float:
        """The size of most text, a little below the usual one."""
        from matplotlib import rcParams

        return 0.92 * float(rcParams["font.size"])

    def colours(self, names: Sequence[str]) -> dict[str, str]:
        """A colour for each name."""
        return colours(self.theme, names)

    def quiet(self, unit: str, along: Side, lines: int = 0) -> None:
        """Quiet axes: no frame, a grid along one side, and the unit of that side.

        The unit is the axis's label, or where a caption has the title it stands in its place: no
        label is turned then, and a phone has room.

        Args:
            unit: What the numbers along that side are.
            along: The side.
            lines: Lines of a legend that stands between the title and the Axes.
        """
        axes, theme = self.axes, self.theme
        axes.set_facecolor(theme["paper"])
        axes.grid(visible=True, axis=along, color=theme["grid"], linewidth=1)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(theme["faint"])
        axes.tick_params(length=0, labelsize=self.small, labelcolor=theme["muted"], pad=6)
        self.head(unit, lines)
        if self.title is not None:
            label = axes.set_xlabel if along == "x" else axes.set_ylabel
            label(printable(unit), color=theme["muted"], fontsize=self.small)

    def head(self, unit: str, lines: int = 0) -> None:
        """The title above the Axes, or the unit where a caption has the title."""
        text = printable(unit if self.title is None else self.title)
        self.axes.set_title(
            text,
            loc="left",
            fontsize=self.small / 0.92,
            color=self.theme["ink"],
            pad=10 + lines * 1.5 * self.small,
        )

    def write(
        self,
        text: str,
        at: tuple[float, float],
        coordinates: str | tuple[str, str] = "data",
        *,
        shift: tuple[float, float] = (0, 0),
        ha: str = "left",
        va: str = "center",
        colour: str = "ink",
        inside: bool = False,
        covers: bool = False,
    ) -> None:
        """Small text, ``shift`` points away from a place.

        Args:
            text: The text.
            at: The place.
            coordinates: What ``at`` is measured in.
            shift: Points to the right and up.
            ha: Horizontal alignment.
            va: Vertical alignment.
            colour: A name of the theme, or a colour.
            inside: It lies on the Axes, and must not make them smaller.
            covers: It hides what is behind it.
        """
        paper = {"facecolor": self.theme["paper"], "edgecolor": "none", "pad": 1}
        note = self.axes.annotate(
            printable(text),
            at,
            xytext=shift,
            xycoords=coordinates,
            textcoords="offset points",
            ha=ha,
            va=va,
            color=self.theme.get(colour, colour),
            fontsize=self.small,
            annotation_clip=False,
            bbox=paper if covers else None,
        )
        note.set_in_layout(not inside)

    def below(
        self, x: float, line: float, text: str, ha: str = "center", colour: str = "ink"
    ) -> None:
        """A line of text below the Axes, at a place of the data.

        Line by line: only single lines are centred by a browser, with its own font.
        """
        shift = (0, -8 - 1.25 * self.small * line)
        self.write(
            text, (x, 0), ("data", "axes fraction"), shift=shift, ha=ha, va="top", colour=colour
        )

    def rows(self, names: Sequence[str]) -> None:
        """A row per name, from the top."""
        most = 26 if self.narrow else 36
        self.axes.set_ylim(len(names) - 0.4, -0.6)
        self.axes.set_yticks(
            range(len(names)),
            [ending(name, most) for name in names],
            color=self.theme["ink"],
            parse_math=False,
        )

    def depth(self, names: Sequence[str]) -> None:
        """A column per place of a model, in its order; of many names as many as there is room."""
        room = max(2, int(self.width / (1.6 * self.small)))
        step = math.ceil(len(names) / room)
        shown = range(0, len(names), step)
        self.axes.set_xlim(-0.5, len(names) - 0.5)
        self.axes.set_xticks(
            shown,
            [ending(names[i], 24) for i in shown],
            rotation=90,
            color=self.theme["ink"],
            fontsize=self.small,
            parse_math=False,
        )

    def legend(self, handles: Sequence[Any], words: Sequence[str], columns: int) -> None:
        """What the marks mean, above the Axes; on a phone from the left edge of the picture."""
        from matplotlib.transforms import blended_transform_factory

        axes, figure = self.axes, self.axes.get_figure(root=True)
        place = axes.transAxes
        if self.narrow and figure is not None:
            place = blended_transform_factory(figure.transFigure, axes.transAxes)
        axes.legend(
            handles,
            list(map(printable, words)),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            bbox_transform=place,
            ncols=columns,
            frameon=False,
            labelcolor=self.theme["ink"],
            fontsize=self.small,
            handlelength=1.4,
            columnspacing=1.4,
            borderaxespad=0.3,
            borderpad=0,
        )


def ending(path: str, most: int) -> str:
    """The end of a long path: there it says which layer it is."""
    path = printable(path)
    return path if len(path) <= most else "…" + path[1 - most :]


def short(name: str, most: int) -> str:
    """The name as plain text of at most ``most`` characters; both ends are kept."""
    name = printable(name)
    if len(name) <= most:
        return name
    head = (most - 1) // 3
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


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
