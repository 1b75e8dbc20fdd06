"""Every page: its code runs from top to bottom, and prints what the page says.

Run are blocks of Python, and of a shell the lines that call ``truenorm``. Code that a reader need
not see stands in a comment, ``<!--python … -->``: what a page takes for granted, and checks. A
block whose title names backends runs on these; a ``text`` block directly behind code is what it
prints.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import keras
import pytest

import truenorm as tn
from truenorm._records.stored_model import StoredModel

DOCS = Path(__file__).parents[2] / "docs"
ENGLISH = [path for path in sorted(DOCS.rglob("*.md")) if not path.name.endswith(".zh-CN.md")]
CHINESE = sorted(DOCS.rglob("*.zh-CN.md"))
LONG = {"cli.md", "small_batches.md", "statistics.md", "study.md", "study_on_ray.md"}
"""Pages that train for a while, or start many processes or a cluster."""

BACKEND = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}[keras.config.backend()]
BLOCK = re.compile(
    r'^(?:```(?P<language>\w+)(?: title="(?P<title>.+?)")?\n(?P<code>.*?)^```$'
    r'|<!--python(?: title="(?P<aside>.+?)")?\n(?P<hidden>.*?)^-->$)'
    r"(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(r"^(?:\$ )?(truenorm (?:.*\\\n)*.*)$", re.MULTILINE)
ELSEWHERE = re.compile(r"HEAD:|study merge")
"""Commands that need another machine, or another folder of the same study."""


class Block(NamedTuple):
    """Code of a page, in which language, and what it prints."""

    language: str
    code: str
    output: str | None


def blocks(page: Path) -> list[Block]:
    """What is to run on this backend."""
    found: list[Block] = []
    for block in BLOCK.finditer(page.read_text("utf-8")):
        title = block["title"] or block["aside"] or BACKEND
        if BACKEND in title:
            language = block["language"] or "python"
            found.append(Block(language, block["code"] or block["hidden"], block["output"]))
    return found


def run_python(block: Block, page: Path, names: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block.code, str(page), "exec"), names)  # noqa: S102
    if block.output is not None:
        lines = [line.rstrip() for line in printed.getvalue().splitlines()]
        assert lines == block.output.splitlines(), block.code


def run_shell(block: Block) -> None:
    for command in COMMAND.findall(block.code):
        if not ELSEWHERE.search(command):
            shorter = re.sub(r"--(epochs|seeds) \d+", r"--\1 2", command)
            program = "from truenorm._cli import main; main()"
            done = subprocess.run(
                ["bash", "-c", f'truenorm() {{ "$PYTHON" -c "$PROGRAM" "$@"; }}\n{shorter}'],
                capture_output=True, text=True, check=False,
                env={**os.environ, "PYTHON": sys.executable, "PROGRAM": program},
            )  # fmt: skip
            found = (0, 1) if "diagnose" in command else (0,)  # 1: something is wrong
            assert done.returncode in found, f"{command}\n{done.stderr}"


def pages() -> list[Any]:
    """A test for each page that has code."""
    return [
        pytest.param(
            page,
            id=str(page.relative_to(DOCS)),
            marks=[pytest.mark.long if page.name in LONG else pytest.mark.any_backend],
        )
        for page in ENGLISH
        if BLOCK.search(page.read_text("utf-8"))
    ]


@pytest.mark.filterwarnings(
    "ignore:Gradients do not exist",  # TN409, and Keras sees it as well
    "ignore:.*_at_fork.*:pytest.PytestUnraisableExceptionWarning",  # JAX, where Ray is started
    "ignore:os.fork:RuntimeWarning",
)
@pytest.mark.long
@pytest.mark.parametrize("page", pages())
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # pages show what a pipe gets
    if page.name in ("study.md", "conversion.md"):  # a study of the same kind that ends soon
        short = {"epochs": 1, "seeds": 2, "runner": "here"}
        monkeypatch.setattr(tn, "study", lambda *a, real=tn.study, **k: real(*a, **k | short))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language in ("python", "py"):
            run_python(block, page, names)
        elif block.language in ("sh", "console"):
            run_shell(block)
    if page.parent.name == "findings" and page.stem != "README":
        assert page.stem in {finding.code for finding in names["diagnosis"].findings}


@pytest.mark.any_backend
@pytest.mark.parametrize("page", CHINESE, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_chinese_page_shows_the_same_code_and_output(page: Path) -> None:
    def shown(path: Path) -> list[tuple[str, str | None]]:
        found = [block for block in BLOCK.finditer(path.read_text("utf-8")) if block["language"]]
        return [
            (
                ast.unparse(ast.parse(block["code"]))  # without comments
                if block["language"] == "python"
                else re.sub(" *#.*", "", block["code"]),
                block["output"],
            )
            for block in found
        ]

    english = page.with_name(page.name.replace(".zh-CN", ""))
    assert shown(page) == shown(english)
    for heading in ("\n## ", "\n### "):
        assert page.read_text("utf-8").count(heading) == english.read_text("utf-8").count(heading)


@pytest.mark.any_backend
def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r"[\w/]+\.md", (DOCS.parent / "mkdocs.yml").read_text("utf-8")))
    assert menu == {str(page.relative_to(DOCS)) for page in ENGLISH}


@pytest.mark.any_backend
def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    public = [name for name in tn.__all__ if not isinstance(getattr(tn, name), ModuleType)]
    public += [f"callbacks.{name}" for name in tn.callbacks.__all__]
    assert [name for name in public if not re.search(rf"::: truenorm\.{name}\b", text)] == []


@pytest.mark.any_backend
def test_the_page_about_the_command_names_the_fields_of_its_json() -> None:
    page = (DOCS / "cli.md").read_text("utf-8")
    listed = re.findall(r"^\| .* \| `truenorm\.(\w+)` \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(listed) == 6
    for name, fields in listed:
        kind = getattr(tn, name, StoredModel)
        assert kind.__name__ == name
        shown = [f.name for f in dataclasses.fields(kind) if f.metadata.get("data", True)]
        assert re.findall(r"`(\w+)`", fields) == shown
