"""The pages that show output: their code runs, and prints what the page says."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import truenorm as tn
from truenorm._records.stored_model import StoredModel

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def test_the_page_about_modes_prints_what_it_shows() -> None:
    names: dict[str, Any] = {}
    page = (DOCS / "modes.md").read_text("utf-8")
    shown = SHOWN.findall(page)
    assert len(shown) == page.count("```python") > 0
    for code, expected in shown:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "docs/modes.md", "exec"), names)  # noqa: S102
        lines = [line.rstrip() for line in printed.getvalue().splitlines()]
        assert lines == expected.splitlines(), code


def test_the_chinese_page_shows_the_same_code_and_output() -> None:
    english, chinese = ((DOCS / name).read_text("utf-8") for name in ("modes.md", "modes.zh-CN.md"))
    assert SHOWN.findall(chinese) == SHOWN.findall(english)
    assert chinese.count("\n## ") == english.count("\n## ")


def test_the_page_about_the_command_names_the_fields_of_its_json() -> None:
    page = (DOCS / "cli.md").read_text("utf-8")
    listed = re.findall(r"^\| .* \| `truenorm\.(\w+)` \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(listed) == 6
    for name, fields in listed:
        kind = getattr(tn, name, StoredModel)
        assert kind.__name__ == name
        shown = [f.name for f in dataclasses.fields(kind) if f.metadata.get("data", True)]
        assert re.findall(r"`(\w+)`", fields) == shown
