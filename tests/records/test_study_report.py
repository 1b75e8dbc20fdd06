"""A study writes its own page."""

from __future__ import annotations

from pathlib import Path

import pytest

import truenorm as tn
from truenorm._records.study import Comparison, Interval, Trial
from truenorm.report import study_page

pytestmark = pytest.mark.any_backend


def test_a_study_writes_its_report(tmp_path: Path) -> None:
    trials = tuple(
        Trial(name, seed, {"val_loss": (1.0, 0.5 + seed / 10)}, {"val_loss": 0.5}, 1, 10, 1.0, "a")
        for name in ("none", "before_activation")
        for seed in (0, 1)
    )
    mean = Interval(0.5, 0.4, 0.6, 2)
    pair = Comparison("val_loss", "none", "before_activation", mean, 0.5, 0.5)
    summaries = {name: {"val_loss": mean} for name in ("none", "before_activation")}
    study = tn.Study(
        "wine", {"seeds": [0, 1]}, trials, summaries, (pair,), "val_loss", "none", None, ("Equal.",)
    )
    study.report(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text("utf-8") == study_page(study)
    again = tn.Study.from_json(study.to_json())
    again.report(tmp_path / "b.html", title="Wine")
    assert (tmp_path / "b.html").read_text("utf-8") == study_page(study, "Wine")
    with pytest.raises(tn.OutputError, match="cannot be written"):
        study.report(tmp_path / "no" / "a.html")
