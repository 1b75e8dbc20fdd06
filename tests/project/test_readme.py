"""The README: its code runs as it stands, and is the same in both languages."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import truenorm as tn

ROOT = Path(__file__).parents[2]


def blocks(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text("utf-8"), flags=re.DOTALL)


@pytest.mark.long
def test_the_code_runs_from_top_to_bottom(tmp_path: Path) -> None:
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks("README.md")), "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", program],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    in_fit, stale, recalibrated = map(float, done.stdout.split()[:3])
    assert in_fit > 0.95
    assert stale < 0.3
    assert recalibrated > 0.95
    for shown in (
        "place after_activation: 33 of 53 sites changed",
        "before_activation − after_activation",
        "fold: 1 of 1 site changed",
        "TN102 warning",
    ):
        assert shown in done.stdout
    assert (tmp_path / "deploy.keras").is_file()
    assert (tmp_path / "modes.png").is_file()


def test_both_languages_show_the_same_code_of_public_names() -> None:
    code = [ast.unparse(ast.parse(block)) for block in blocks("README.md")]  # without comments
    assert [ast.unparse(ast.parse(block)) for block in blocks("README.zh-CN.md")] == code
    names = set(re.findall(r"\btn\.(\w+)", "\n".join(code)))
    assert names
    assert names <= set(tn.__all__)


@pytest.mark.parametrize("language", ["```sh\n", "```text\n"])
def test_both_languages_show_the_same_commands_and_output(language: str) -> None:
    def shown(readme: str) -> list[str]:
        text = (ROOT / readme).read_text("utf-8")
        lines = "".join(re.findall(language + "(.*?)```", text, flags=re.DOTALL)).splitlines()
        return [line.partition("#")[0].rstrip() for line in lines]

    assert shown("README.zh-CN.md") == shown("README.md")
