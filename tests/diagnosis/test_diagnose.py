"""diagnose as users meet it: selection, what it leaves alone, its record, its pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from small_models import dense, shake, snapshot, subclassed

import truenorm as tn
from truenorm._demo.tasks import digits
from truenorm._diagnosis.table import RULES
from truenorm._records.diagnosis import Diagnosis, Finding
from truenorm._statistics.runner import Runner

pytestmark = pytest.mark.any_backend

PAGES = Path(__file__).parents[2] / "docs" / "findings"
L = keras.layers


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, Any]:
    """A small network that has learned the digits, until it came to rest."""
    keras.utils.set_random_seed(0)
    (x, y), _ = digits()
    x, y = x[:1344], y[:1344]  # whole batches: one compilation
    layers = []
    for filters in (8, 16):
        layers += [
            L.Conv2D(filters, 3, strides=2, padding="same", use_bias=False),
            L.BatchNormalization(momentum=0.9),
            L.ReLU(),
        ]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers, L.Flatten(), L.Dense(10)])
    epochs, size = 8, 96
    steps = epochs * len(x) // size
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-2, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, epochs=epochs, batch_size=size, verbose=0)
    return model, x, y


@pytest.fixture(scope="module")
def diagnosis(trained: tuple[Any, Any, Any]) -> tn.Diagnosis:
    model, x, y = trained
    before = snapshot(model)
    found = tn.diagnose(model, x, y, batch_size=96)
    assert snapshot(model) == before
    return found


def test_a_healthy_model_that_has_learned_has_nothing_above_a_note(
    diagnosis: tn.Diagnosis, trained: tuple[Any, Any, Any]
) -> None:
    model, x, y = trained
    assert model.evaluate(x, y, batch_size=96, verbose=0)[1] > 0.98
    assert diagnosis.findings == ()
    assert diagnosis.clean
    assert diagnosis.worst is None


def test_all_rules_ran_on_it(diagnosis: tn.Diagnosis) -> None:
    assert diagnosis.checked == tuple(rule.code for rule in RULES)
    assert diagnosis.skipped == ()


def test_pictures_of_another_kind_are_told_from_those_it_learned(
    trained: tuple[Any, Any, Any],
) -> None:
    model, x, y = trained
    found = tn.diagnose(model, 2 * x + 0.3, y, select="TN1", ignore="TN107", batch_size=448)
    by_code = {f.code: f for f in found.findings}
    assert {"TN104", "TN110"} <= set(by_code)
    found = by_code["TN110"].evidence
    assert found["accuracy_in_inference"] < found["accuracy_in_training"] - 0.1
    assert found["accuracy_recalibrated"] > found["accuracy_in_inference"] + 0.1


# --- what runs ---------------------------------------------------------------------------------


def codes(**options: Any) -> list[str]:
    return list(tn.diagnose(shake(dense()), **options).checked)


def test_selecting_and_ignoring_by_the_beginning_of_a_code() -> None:
    parameters = [rule.code for rule in RULES if rule.code.startswith("TN2")]
    assert codes(select="TN2") == parameters
    assert codes(select=["TN201", "TN501"]) == ["TN201", "TN501"]
    assert codes(select="TN2", ignore="TN201") == parameters[1:]
    assert codes(select="TN201", ignore="TN2") == ["TN201"]
    assert codes(select="TN2", ignore="TN2") == []
    assert codes(ignore=["TN1", "TN3", "TN4", "TN5"]) == parameters


@pytest.mark.parametrize("wrong", ["E501", "TN9", "", "tn1"])
def test_a_code_that_no_rule_has_is_refused(wrong: str) -> None:
    message = (
        rf"^No rule has a code that begins so \(at 'select'\)\. Expected: TN1, .*\. "
        rf"Received: '{wrong}'\.$"
    )
    with pytest.raises(tn.OptionError, match=message):
        tn.diagnose(dense(), select=wrong)


def breaking() -> Iterator[Any]:
    raise AssertionError("read")
    yield


def test_what_is_not_asked_for_is_not_computed() -> None:
    class Unread:
        def __iter__(self) -> Iterator[Any]:
            return breaking()

    assert tn.diagnose(shake(dense()), Unread(), select=["TN105", "TN206"]).checked
    with pytest.raises(AssertionError, match="read"):
        tn.diagnose(shake(dense()), Unread(), select="TN103")


def test_data_that_can_be_read_only_once_is_refused() -> None:
    class Once:
        rest = iter(np.ones((20, 8, 5), "float32"))

        def __iter__(self) -> Iterator[Any]:
            return self.rest

    message = (
        r"^The data gave nothing when it was read again \(at 'data'\)\. Expected: data that can be "
        r"read several times\. Remedy: give a list of its batches\.$"
    )
    with pytest.raises(tn.DataError, match=message):
        tn.diagnose(shake(dense()), Once(), select="TN109")


def test_inference_is_compared_on_a_part_of_long_data_and_that_is_said() -> None:
    layer = keras.layers.BatchNormalization(moving_mean_initializer=keras.initializers.Constant(5))
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile("sgd", "mean_squared_error")
    x = np.random.default_rng(1).normal(size=(200, 3)).astype("float32")
    y = (x - x.mean(0)) / x.std(0)
    found = tn.diagnose(model, x, y, select="TN110", batch_size=4)
    assert found.compared == (32, 50)
    assert "Training and inference compared on 32 of 50 batches." in str(found)
    assert tn.Diagnosis.from_json(found.to_json()) == found
    mixed = np.random.default_rng(0).permutation(200).reshape(50, 4)
    some = mixed[np.linspace(0, 49, 32).astype(int)].ravel()
    expected = np.mean(((x[some] - 5) / np.sqrt(1 + 1e-3) - y[some]) ** 2)
    assert found.findings[0].evidence["loss_in_inference"] == pytest.approx(expected, rel=1e-5)
    for few in (
        tn.diagnose(model, x[:128], y[:128], select="TN110", batch_size=4),
        tn.diagnose(model, x, y, select="TN105", batch_size=4),
    ):
        assert few.compared is None
        assert "compared on" not in str(few)


def test_rules_that_need_data_are_skipped_without_and_that_is_said() -> None:
    diagnosis = tn.diagnose(shake(dense()), select="TN1", ignore="TN107")
    (skipped,) = diagnosis.skipped
    assert skipped.reason == "no data was given"
    assert skipped.codes == ("TN102", "TN103", "TN104", "TN108", "TN109", "TN110", "TN111")
    assert "Not checked: TN102, TN103" in str(diagnosis)


def test_a_subclassed_model_gets_the_rules_that_need_no_graph() -> None:
    model = subclassed()
    before, x = snapshot(model), np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    batches = (x[i : i + 8] for i in range(0, 64, 8))  # an iterator: it is kept in memory
    diagnosis = tn.diagnose(model, batches)
    assert snapshot(model) == before
    (skipped,) = diagnosis.skipped
    assert skipped.reason == "the model is subclassed, so its graph cannot be read"
    assert {"TN101", "TN108", "TN110", "TN202", "TN401"} <= set(diagnosis.checked)
    assert "TN101" in {f.code for f in diagnosis.findings}
    reasons = {s.reason for s in tn.diagnose(model, select=["TN104", "TN401"]).skipped}
    assert "a subclassed model does not say what its inputs are" in reasons


def test_a_class_of_somebodys_own_is_not_run_over_data() -> None:
    class Mine(L.BatchNormalization):
        pass

    model = keras.Sequential([keras.Input((4,)), Mine(name="bn"), L.Dense(1)])
    diagnosis = tn.diagnose(model, np.zeros((8, 4), "float32"), select=["TN103", "TN202"])
    assert diagnosis.checked == ("TN202",)
    assert diagnosis.skipped[0].reason == "what the class of 'bn' normalises is not known"


def test_data_that_is_no_numbers_is_said_and_the_other_rules_run() -> None:
    data = np.full((8, 5), np.nan, "float32")
    diagnosis = tn.diagnose(shake(dense()), data, select=["TN1", "TN2"], ignore="TN107")
    (skipped,) = diagnosis.skipped
    assert skipped.reason == "the data makes values at 'bn' that are not finite numbers"
    assert [f.code for f in diagnosis.findings] == ["TN206"]


def test_what_cannot_be_diagnosed_is_refused() -> None:
    with pytest.raises(tn.ModelError, match="This model has no BatchNormalization"):
        tn.diagnose(keras.Sequential([keras.Input((3,)), L.Dense(2)]), select="TN2")
    model = shake(dense())
    with pytest.raises(tn.DataError, match="There is no data to take statistics of"):
        tn.diagnose(model, np.zeros((0, 5), "float32"), select="TN103")
    with pytest.raises(tn.DataError, match="There is no data to take statistics of"):
        tn.diagnose(model, np.zeros((0, 5), "float32"), select="TN4")
    with pytest.raises(tn.DataError, match="Labels are given beside data that is not arrays"):
        tn.diagnose(model, [np.zeros((4, 5), "float32")], np.zeros(4), select="TN103")


# --- the record --------------------------------------------------------------------------------


def test_the_record_prints_the_gravest_first_and_puts_like_sites_together() -> None:
    layers = [layer for i in "abcd" for layer in (L.Dense(4), L.BatchNormalization(name=i))]
    model = keras.Sequential([keras.Input((4,)), *layers, L.Dense(1)], name="stack")
    model.get_layer("b").moving_variance.assign([-1, 1, 1, 1])
    diagnosis = tn.diagnose(model, select=["TN1", "TN206"], ignore="TN107")
    assert diagnosis.worst == "error"
    assert not diagnosis.clean
    assert str(diagnosis).startswith("Diagnosis of 'stack': 1 error, 3 warnings, 4 notes (4 rules)")
    (table,) = diagnosis.tables()
    assert [row[0] for row in table.rows] == ["TN105 error", "TN101 warning", "TN206 note"]
    assert table.rows[1][2] == "3 sites: a, … d"
    assert table.rows[2][3] == "weights 4, largest bias 0"
    assert table.notes[0] == "Remedy of TN105, TN101: tn.recalibrate(model, data)"
    assert "<table" in diagnosis._repr_html_()
    assert str(diagnosis.findings[0]).startswith("TN101: moving statistics never updated")


def test_remedies_that_differ_in_their_site_only_share_a_line() -> None:
    layers = [L.BatchNormalization(name=f"bn{i}", trainable=False) for i in range(4)]
    model = keras.Sequential([keras.Input((4,)), *layers, L.Dense(1)], name="held")
    (table,) = tn.diagnose(model, select="TN404").tables()
    assert table.notes == (
        "Remedy of TN404: tn.unfreeze(model, layers='bn0'), and so for each of the 4 sites",
    )
    found = tuple(
        Finding("TN1", "note", "", name, {}, f"truenorm fold FILE --where {name} --out new.keras")
        for name in ("a", "b/c")
    )
    assert Diagnosis("net", found, ("TN1",)).tables()[0].notes == (
        "Remedy of TN1: truenorm fold FILE --where a --out new.keras, and so for each of the 2 "
        "sites",
    )


def test_the_record_goes_to_json() -> None:
    plain = json.loads(tn.diagnose(shake(dense()), select=["TN1", "TN206"]).to_json())
    (finding,) = plain["findings"]
    assert finding["code"] == "TN206"
    assert finding["evidence"]["weights"] == 6
    assert plain["skipped"][0]["reason"] == "no data was given"


def test_the_record_knows_all_sites_in_their_order_and_draws_its_findings_there() -> None:
    layers = [L.BatchNormalization(name=name) for name in ("z", "a", "m")]
    between = [L.Conv2D(4, 1, use_bias=name == "m", name=f"conv_{name}") for name in "zam"]
    model = keras.Sequential(
        [
            keras.Input((2, 2, 3)),
            *(one for pair in zip(between, layers, strict=True) for one in pair),
        ],
        name="net",
    )
    diagnosis = tn.diagnose(model, select="TN206")
    assert diagnosis.sites == ("z", "a", "m")
    assert [f.site for f in diagnosis.findings] == ["m"]
    axes = diagnosis.plot()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["z", "a", "m"]
    assert 2.0 in [x for line in axes.lines for x in line.get_xdata() if line.get_marker() == "o"]
    assert tn.diagnose(subclassed(), select="TN105").sites


def test_a_finding_at_another_layer_is_named_and_not_drawn_along_the_whole_model() -> None:
    found = (
        Finding("TN110", "warning", "does otherwise", "net", {}, "-"),
        Finding("TN301", "note", "has none", "up", {}, "-"),
        Finding("TN301", "note", "has none", "b", {}, "-"),
    )
    drawing = Diagnosis("net", found, ("TN110", "TN301"), sites=("a", "b")).drawing()
    assert drawing.rows == {"TN110": "does otherwise", "TN301": "has none: up"}
    assert [(mark.row, mark.place) for mark in drawing.marks] == [("TN110", "net"), ("TN301", "b")]


# --- the pages ---------------------------------------------------------------------------------


def test_every_rule_has_a_page_and_every_page_a_rule() -> None:
    assert {page.stem for page in PAGES.glob("TN*.md")} == {rule.code for rule in RULES}
    index = (PAGES / "README.md").read_text("utf-8")
    listed = re.findall(
        r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \| (.*?) \|", index, flags=re.MULTILINE
    )
    assert listed == [(rule.code, rule.code, rule.severity, rule.problem) for rule in RULES]


SECTIONS = ["Why it matters", "How it is measured", "How to fix it", "Example"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_page_says_what_it_has_to(rule: Any) -> None:
    text = (PAGES / f"{rule.code}.md").read_text("utf-8")
    assert text.startswith(f"# {rule.code}: {rule.problem}\n\nSeverity: {rule.severity}.")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == SECTIONS
    for link in re.findall(r"\]\((TN\d+\.md)\)", text):
        assert (PAGES / link).exists()
    assert f'select="{rule.code}"' in example_of(rule.code)


def example_of(code: str) -> str:
    (block,) = re.findall(
        r"```python\n(.*?)```", (PAGES / f"{code}.md").read_text("utf-8"), re.DOTALL
    )
    return block


QUICK = [rule.code for rule in RULES if set(rule.needs) <= {"graph"}]


@pytest.mark.parametrize("code", [*QUICK, "TN102", "TN104"])
def test_the_example_of_a_page_has_what_the_page_is_about(code: str) -> None:
    names: dict[str, Any] = {}
    exec(example_of(code), names)  # noqa: S102
    assert {finding.code for finding in names["diagnosis"].findings} == {code}
    if code == "TN102":  # after 20 steps
        share = names["diagnosis"].findings[0].evidence["initial_share"]
        assert share == pytest.approx(0.99**20, abs=0.005)


@pytest.mark.parametrize(("recalibrated", "runs"), [(True, 2), (False, 3)])
def test_how_often_it_runs_the_model_on_a_batch(runs: int, *, recalibrated: bool) -> None:
    """As training, and as inference; as recalibrated only if there is something to mend."""
    model = keras.Sequential([keras.Input((6,)), L.BatchNormalization(name="bn"), L.Dense(1)])
    model.compile(loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (320, 6)).astype("float32"), rng.normal(size=(320, 1))
    if recalibrated:
        tn.recalibrate(model, x)
    run = mock.Mock(side_effect=Runner._checked)
    with mock.patch.object(Runner, "_checked", lambda *arguments: run(*arguments)):
        found = tn.diagnose(model, x, y, select=["TN101", "TN103", "TN109", "TN110"])
    assert found.clean == recalibrated
    assert run.call_count == runs * 10
