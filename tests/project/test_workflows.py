"""What runs on a forge can be run here: each step is a target of the Makefile that exists."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_backend

ROOT = Path(__file__).parents[2]
BACKENDS = ("jax", "tensorflow", "torch")
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def targets() -> set[str]:
    """Those of the Makefile, patterns over the backends included."""
    text = (ROOT / "Makefile").read_text("utf-8")
    plain = re.findall(r"^([a-z]+):", text, flags=re.MULTILINE)
    patterns = re.findall(r"^\$\(addprefix ([a-z]+)-,\$\(BACKENDS\)\):", text, flags=re.MULTILINE)
    return {*plain, *(f"{name}-{backend}" for name in patterns for backend in BACKENDS)}


def called(text: str) -> set[str]:
    """What a workflow makes, with every value of its matrices."""
    found: set[str] = set()
    for job in re.split(r"^  (?=\w+:$)", text, flags=re.MULTILINE):
        matrix = re.search(r"matrix: \{(.*)\}", job)
        axes = re.findall(r"(\w+): \[([^\]]*)\]", matrix[1]) if matrix else []
        for chosen in itertools.product(*(values.split(", ") for _, values in axes)):
            step = job
            for (name, _), value in zip(axes, chosen, strict=True):
                step = step.replace(f"${{{{ matrix.{name} }}}}", value)
            found |= set(re.findall(r"run: make (\S+)", step))
    return found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_each_step_is_a_target_that_exists(workflow: Path) -> None:
    wanted = called(workflow.read_text("utf-8"))
    assert wanted
    assert wanted <= targets()


def test_all_backends_and_versions_are_tried() -> None:
    wanted = called((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    kinds = ("test", "lowest", "newest")
    assert {f"{kind}-{backend}" for kind in kinds for backend in BACKENDS} <= wanted
    assert {"lint", "long", "docs", "wheel", "sbom"} <= wanted
