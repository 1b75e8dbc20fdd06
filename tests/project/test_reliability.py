"""The page about reliability: every fault has its row, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows() -> dict[str, list[tuple[str, str]]]:
    """The tests of each fault and class of holes."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (ROOT / "docs" / "reliability.md").read_text("utf-8").splitlines():
        started = re.match(r"\| (\d+|CVE-\d+-\d+) ", line)
        if started:
            found[started[1]] = re.findall(r"`([\w/]+\.py)::(\w+)`", line)
    return found


def test_every_fault_and_every_hole_has_a_row() -> None:
    names = set(rows())
    assert {name for name in names if name.isdigit()} == {str(n) for n in range(1, 47)}
    assert sum(name.startswith("CVE-") for name in names) == 13


def test_every_test_that_the_page_names_exists() -> None:
    without = {name for name, tests in rows().items() if not tests}
    assert not without
    for tests in rows().values():
        for file, name in tests:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), (file, name)
