"""The colours of all drawings, on light paper and on dark.

Each stays apart from the others for the common colour deficiencies (they are Okabe and Ito's, made
darker or lighter), and reads as text on its paper. The papers are those of the report's page.css.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Theme = Mapping[str, str]
"""A colour for each name."""

LIGHT: Theme = {
    "ink": "#1b2027",
    "muted": "#58616d",
    "faint": "#b4bbc5",
    "grid": "#e6e9ed",
    "paper": "#ffffff",
    "blue": "#0a4f9c",
    "orange": "#c75000",
    "green": "#00806a",
    "slate": "#39404a",
    "purple": "#9b3d90",
    "olive": "#7d6608",
    "crimson": "#a3213b",
    "indigo": "#3b3f8f",
}
DARK: Theme = {
    "ink": "#e8ebf0",
    "muted": "#a2abb8",
    "faint": "#566070",
    "grid": "#2b313a",
    "paper": "#14171c",
    "blue": "#5fa6ee",
    "orange": "#f7975a",
    "green": "#63dcc1",
    "slate": "#838c98",
    "purple": "#dc92d3",
    "olive": "#d2b64a",
    "crimson": "#f08c9e",
    "indigo": "#9aa0f0",
}
_POSITIONS = {
    "before_activation": "blue",
    "after_activation": "orange",
    "before_layer": "green",
    "none": "slate",
}
_OTHERS = ("purple", "olive", "crimson", "indigo")


def colours(theme: Theme, names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: always the same for the known positions, by order for others."""
    others = [name for name in names if name not in _POSITIONS]
    free = [*_OTHERS, *(colour for name, colour in _POSITIONS.items() if name not in names)]
    return {
        name: theme[_POSITIONS.get(name) or free[others.index(name) % len(free)]] for name in names
    }
