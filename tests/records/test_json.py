"""Text that is not the JSON of a record is refused with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import truenorm as tn

pytestmark = pytest.mark.any_backend

FINDING = tn.Finding("TN101", "note", "a problem", "bn", {"gap": 0.5, "word": "w"}, "a call")
DIAGNOSIS = tn.Diagnosis("net", (FINDING,), ("TN101",))


def altered(change: Callable[[Any], object]) -> str:
    content = json.loads(DIAGNOSIS.to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "Received: list."),
        (FINDING.to_json(), "(at 'schema'). Expected: truenorm.Diagnosis, version 1. "
                            "Received: truenorm.Finding, 1."),
        (altered(lambda d: d.update(schema_version=2)), "Received: truenorm.Diagnosis, 2."),
        (altered(lambda d: d.pop("model")), "Expected: all fields of Diagnosis."),
        (altered(lambda d: d.update(model=3)), "(at 'model'). Expected: str. Received: 3."),
        (altered(lambda d: d["findings"][0].update(severity="fatal")),
         "(at 'findings[0].severity')"),
        (altered(lambda d: d["findings"][0]["evidence"].update(gap=[])),
         "(at 'findings[0].evidence.gap'). Expected: float or int or str. Received: []."),
        (altered(lambda d: d.update(findings={})), "(at 'findings'). Expected: list."),
    ],
)  # fmt: skip
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(tn.DataError) as refused:
        tn.Diagnosis.from_json(text)
    assert str(refused.value).startswith("This text is not the JSON of such a record")
    assert message in str(refused.value)


def test_a_number_that_is_not_finite_comes_back_as_nan() -> None:
    trial = tn.Study.from_json(
        json.dumps(
            {
                "schema": "truenorm.Study", "schema_version": 1, "truenorm": "0.1.0", "name": "s",
                "settings": {"seeds": [0]}, "trials": [], "comparisons": [], "metric": "m",
                "summaries": {"none": {"m": {"mean": None, "low": None, "high": 1, "n": 2}}},
                "best": "none", "winner": None, "verdict": ["v"],
            }
        )
    )  # fmt: skip
    interval = trial.summaries["none"]["m"]
    assert interval.mean != interval.mean
    assert (interval.low, interval.high, interval.n) == (None, 1.0, 2)
    assert trial.margin is None  # a field that a later version added has its default
