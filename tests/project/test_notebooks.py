"""The notebooks run from top to bottom, and what they keep is what a reader can load quickly."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def runner() -> Any:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_kept(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept, again = (json.loads(path.read_text("utf-8")) for _ in range(2))
    runner().run(again)
    for old, new in zip(kept["cells"], again["cells"], strict=True):
        assert shape(old) == shape(new), "".join(new["source"])


def shape(cell: dict[str, Any]) -> list[Any]:
    """Of each output its kind; of printed text the words, since numbers differ between backends."""
    return [
        (output["output_type"], sorted(output.get("data", {})), words(output.get("text", [])))
        for output in cell.get("outputs", [])
    ]


def words(text: list[str]) -> list[str]:
    return re.findall(r"[a-z]{2,}", "".join(text))


@pytest.mark.any_backend
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_and_is_small(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 60_000
