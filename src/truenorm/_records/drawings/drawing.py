"""A drawing as data, and the way from it to matplotlib's Axes.

What a table is to text, a drawing is to a picture: a record says what is drawn, and whoever shows
it (a notebook through ``plot``, a report through SVG) asks the drawing to paint itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from truenorm._errors import MissingDependencyError
from truenorm._records.drawings.canvas import Canvas
from truenorm._records.drawings.theme import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AS_WRITTEN: dict[Any, Any] = {"text.usetex": False, "text.parse_math": False}
"""matplotlib's settings for text: a name with dollar signs is a name, not a formula."""

_WIDTH = 8.0


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What all drawings have.

    Args:
        title: What is drawn.
        alt: What it shows, in words, for those who do not see it.
        notes: How to read it, and what is missing from it, one sentence each.
    """

    title: str
    alt: str
    notes: tuple[str, ...] = field(default=())

    def height(self, narrow: bool) -> float:
        """How high it should be, in pixels: on a wide page, or on a phone."""
        raise NotImplementedError

    def paint(self, canvas: Canvas) -> None:
        """Paint it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Message(Drawing):
    """Why there is no picture.

    Args:
        text: The reason, one sentence.
    """

    text: str

    def height(self, narrow: bool) -> float:  # noqa: ARG002
        """One line."""
        return 56

    def paint(self, canvas: Canvas) -> None:
        """Write the sentence."""
        canvas.axes.set_axis_off()
        canvas.write(self.text, (0.5, 0.5), "axes fraction", ha="center", colour="muted")


class Drawn:
    """What a record with a picture has beside its tables."""

    def drawing(self) -> Drawing:
        """What :meth:`plot` paints, as data."""
        raise NotImplementedError

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the record with matplotlib.

        Args:
            ax: The Axes to draw on; None: those of a new figure.

        Returns:
            The Axes.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return plot(self.drawing(), ax)


def plot(drawing: Drawing, ax: Axes | None = None) -> Axes:
    """Paint a drawing on these Axes, or on those of a new figure."""
    needs_matplotlib("plot")
    from matplotlib import pyplot as plt
    from matplotlib import rc_context

    with rc_context(AS_WRITTEN):
        if ax is None:
            size = (_WIDTH, (drawing.height(narrow=False) + 70) / 90)
            ax = plt.subplots(figsize=size, layout="constrained")[1]
        drawing.paint(Canvas(ax, _theme_of(ax), title=drawing.title))
    return ax


def needs_matplotlib(extra: str) -> None:
    """Say what to install where matplotlib is missing.

    Raises:
        MissingDependencyError: It is.
    """
    try:
        import matplotlib  # noqa: F401, ICN001  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise MissingDependencyError(
            "A picture needs matplotlib, which is not installed",
            remedy=f'pip install "truenorm[{extra}]"',
        ) from error


def _theme_of(axes: Axes) -> Theme:
    """Light or dark, as the paper is that the user draws on."""
    from matplotlib.colors import to_hex, to_rgba

    paper = to_rgba(axes.get_facecolor())
    if not paper[3]:  # transparent: the figure is the paper
        figure = axes.get_figure(root=True)
        paper = to_rgba(figure.get_facecolor()) if figure is not None else paper
    dark = paper[3] > 0 and sum(paper[:3]) < 1.5
    return {**(DARK if dark else LIGHT), "paper": to_hex(paper) if paper[3] else LIGHT["paper"]}
