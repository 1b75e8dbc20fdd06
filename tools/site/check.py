"""Is every link of the built site good, and does no page need a network?

``python tools/site/check.py build/site`` reads all pages: whatever a link, picture, script or style
sheet names must be in the folder, an anchor on the page that it names, and nothing that the browser
loads by itself may lie elsewhere. Addresses that a reader may click are not tried.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "iframe": "src", "link": "href", "source": "src"}


class Page(HTMLParser):
    """Anchors of a page, and what it names: a tag and an address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {""}
        self.named: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what this tag brings."""
        given = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := given.get(key))}
        if address := given.get("href" if tag == "a" else LOADED.get(tag, "")):
            self.named.append((tag, address))


def faults(site: Path) -> list[str]:
    """One line for each link that is not good."""
    pages = {path.resolve(): Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    found: list[str] = []
    for path, page in pages.items():
        if path.name == "404.html":  # its addresses begin at the root of a server
            continue
        for tag, address in page.named:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if tag != "a" and parts.scheme != "data":
                    found.append(f"{path.relative_to(site.resolve())} loads {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.exists() or (target in pages and anchor not in pages[target].anchors):
                found.append(f"{path.relative_to(site.resolve())} names {address}")
    return sorted(set(found))


if __name__ == "__main__":
    bad = faults(Path(sys.argv[1]))
    print("\n".join(bad) or "All links are good, and nothing is loaded from elsewhere.")
    sys.exit(bool(bad))
