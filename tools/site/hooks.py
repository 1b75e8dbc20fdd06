"""What ``make docs`` does beyond mkdocs: formulas as MathML, ``llms.txt``.

MathML is made when the site is built, so a page needs no script and no font for its formulas.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL
)
_HIDDEN = re.compile(r"<!--.*?-->\n*", re.DOTALL)
_REFERENCE = re.compile(r"^::: truenorm\.(.*)$", re.MULTILINE)
_BROKEN = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])\n *(?=\[?[\u3000-\u9fff\uff00-\uffef])")
"""An end of a line in Chinese, of which a browser makes a space."""
_PAGES: dict[str, str] = {}
"""Of each English page: its address, and its Markdown."""


def on_config(config: Any, **_: Any) -> None:
    """Keep what the site is about, before its Chinese half is made."""
    _PAGES.setdefault("", f"# {config.site_name}\n\n> {config.site_description}\n\n## Pages\n")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leave out what is for the tests only: code that stands in a comment."""
    shown = _HIDDEN.sub("", markdown)
    if page.file.src_uri.endswith(".zh-CN.md"):
        return _BROKEN.sub("", shown)
    _PAGES[page.file.src_uri] = shown
    return shown


def on_page_content(content: str, **_: Any) -> str:
    """Put MathML in the place of each formula."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    formula = " ".join(html.unescape(found[2] or found[3]).split())
    if "&" in formula or r"\\" in formula:
        formula = rf"\begin{{aligned}} {formula} \end{{aligned}}"
    return convert(formula, display="inline" if found[2] else "block")


def on_post_build(config: Any, **_: Any) -> None:
    """Write ``llms.txt``: what there is to read, each page as Markdown beside its HTML."""
    package: Any = griffe.load("truenorm", search_paths=["src"])

    def documented(found: re.Match[str]) -> str:
        return f"## truenorm.{found[1]}\n\n{package[found[1]].docstring.value}"

    lines = [_PAGES[""]]
    for uri, text in sorted(_PAGES.items())[1:]:
        target = Path(config.site_dir, uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_REFERENCE.sub(documented, text), "utf-8")
        heading, _, rest = text.strip().partition("\n")
        lines.append(f"- [{heading.lstrip('# ')}]({uri}): {_about(rest)}")
    Path(config.site_dir, "llms.txt").write_text("\n".join([*lines, ""]), "utf-8")


def _about(text: str) -> str:
    """The first sentence of a page; of one of the reference the names that it explains."""
    for paragraph in text.split("\n\n"):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
        if plain and plain[0] not in "#|:-" and not plain.startswith(("```", "Severity:", "[")):
            return re.split(r"(?<=[.?!]) ", plain, maxsplit=1)[0]
    return ", ".join(_REFERENCE.findall(text))
