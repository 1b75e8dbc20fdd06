"""Drawings as stand-alone SVG.

Each is painted twice, for a wide page and for a phone, so that its text has the same size on both.
Text stays text in the page's own fonts; it is laid out with the metrics of DejaVu Sans, which is
wider than the system fonts that replace it, so nothing overlaps. The SVG carries its own dark
colours: as an image it cannot take them from the page.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from truenorm._records.drawings.canvas import Canvas
from truenorm._records.drawings.drawing import AS_WRITTEN, Drawing, needs_matplotlib
from truenorm._records.drawings.theme import DARK, LIGHT
from truenorm._records.tables import printable

WIDE, NARROW = 880, 360

_FONTS = "-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_SETTINGS: dict[Any, Any] = {
    **AS_WRITTEN,
    "svg.fonttype": "none",
    "svg.hashsalt": "truenorm",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 13.0,
    "lines.solid_capstyle": "round",
}


def svg(drawings: Sequence[Drawing], *, narrow: bool, stacked: bool, title: str, alt: str) -> str:
    """Drawings as one SVG document.

    Args:
        drawings: What is painted.
        narrow: For a phone; several then always stand below one another.
        stacked: Whether several stand below one another on a wide page, too.
        title: The document's title.
        alt: Its description.
    """
    needs_matplotlib("report")
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    below = narrow or stacked
    width = NARROW if narrow else WIDE
    heights = [drawing.height(narrow) for drawing in drawings]
    height = sum(heights) if below else max(heights)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The user's own style and matplotlibrc must not change a report.
    with style.context("default"), rc_context(_SETTINGS), warnings.catch_warnings():
        # The browser finds the glyphs that DejaVu Sans lacks.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*", category=UserWarning)
        paper = LIGHT["paper"]
        figure = Figure((width / 72, height / 72), dpi=72, layout="constrained", facecolor=paper)
        shape = (len(drawings), 1) if below else (1, len(drawings))
        ratios = {"height_ratios": heights} if below else {}
        parts = figure.subplots(*shape, squeeze=False, gridspec_kw={"wspace": 0.1, **ratios})
        share = (width - 70) / shape[1]
        for axes, drawing in zip(parts.flat, drawings, strict=True):
            drawing.paint(Canvas(axes, LIGHT, narrow=narrow, width=share))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=nothing, facecolor=paper)
    return _finished(file.getvalue(), title, alt)


_SPARED = re.compile(
    r' id="[A-Za-z0-9.]+_\d+"'  # names of groups, to which nothing refers
    r"|font-family: 'DejaVu Sans', sans-serif; "  # the page's own fonts are used
    r'| transform="rotate\(-0 [^"]*\)"'
    r"|(?<=\.\d)\d+(?![\d%])"  # less than a tenth of a pixel
)


def _finished(text: str, title: str, alt: str) -> str:
    """The document with its words and its dark colours, and without what no browser needs."""
    text = text[text.index("<svg") :]
    text = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', text, count=2)
    # Within tags only: numbers between them are what the drawing says.
    text = re.sub(r"<[^>]+>", lambda tag: _SPARED.sub("", tag[0]), text)
    text = re.sub(r"<g/>|(?<=>)\s+(?=<)", "", text)
    text = re.sub(r"<g>(</g>)", "", text)
    head, body = text.split(">", 1)
    words = "".join(
        f"<{tag}>{html.escape(printable(content))}</{tag}>"
        for tag, content in (("title", title), ("desc", alt))
    )
    used = {name: colour for name, colour in LIGHT.items() if colour in body}
    dark = "".join(
        f'[style*="{what}: {colour}"]{{{what}:{DARK[name]}!important}}'
        for name, colour in used.items()
        for what in ("fill", "stroke")
    )
    style_ = (
        f"text{{font-family:{_FONTS}!important;font-variant-numeric:tabular-nums}}"
        f"@media (prefers-color-scheme:dark){{{dark}}}"
    )
    return f'{head} role="img">\n{words}<style>{style_}</style>{body}'
