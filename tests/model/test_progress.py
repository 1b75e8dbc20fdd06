"""Progress: where it is shown, where it is not, and that nothing is left of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small_models as models

import truenorm as tn
from truenorm._model import progress
from truenorm._model.data import number_of_batches
from truenorm._study.live import told
from truenorm._study.pool import Progress

pytestmark = pytest.mark.any_backend

X = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")

TOOLS: dict[str, tuple[Callable[..., Any], str]] = {
    "collect": (lambda **o: tn.collect(models.dense(), X, batch_size=8, **o), ": pass 1: 8"),
    "recalibrate": (lambda **o: tn.recalibrate(models.dense(), X, **o), ": pass 1: 64"),
    "adapt": (lambda **o: tn.adapt(models.dense(), X, **o), ": pass 1: 32 samples, standard error"),
    "diagnose": (lambda **o: tn.diagnose(models.dense(), X, **o),
                 ": reading the data, batch 1 of 2"),
    "fold": (lambda **o: tn.fold(models.dense(), **o), "folding: comparing each changed place"),
    "replace": (lambda **o: tn.replace(models.dense(), "truenorm", **o),
                "replacing: comparing the outputs"),
    "inspect": (lambda **o: tn.inspect(models.dense(), **o), "inspecting: running evaluate"),
}  # fmt: skip


def screen(said: str) -> str:
    """What is left on the line of a terminal, where a carriage return writes over what was."""
    shown: list[str] = []
    for part in said.split("\r"):
        shown[: len(part)] = part
    return "".join(shown)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is too soon to be shown."""
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    monkeypatch.setattr(progress, "_QUIET", 0.0)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_says_how_far_it_is_and_leaves_nothing(
    tool: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, expected = TOOLS[tool]
    run(progress=True)
    output, said = capsys.readouterr()
    assert output == ""
    assert expected in said
    assert screen(said).strip() == ""
    run()  # a pipe
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run()
    assert expected in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("at_once")
def test_a_notebook_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    tn.collect(models.dense(), X, batch_size=8)
    assert "100%, about 0 s left): pass 1: 64 samples" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_it_is_wiped_when_something_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Any:
        yield X
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tn.collect(models.dense(), broken(), progress=True)
    assert screen(capsys.readouterr().err).strip() == ""


def test_the_line_is_not_longer_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    line = progress.Line("reading")
    line.step("something with a very long name indeed")
    line.wipe()
    assert max(map(len, capsys.readouterr().err.split("\r"))) == 29


def test_the_time_left_follows_from_the_share(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    line = progress.Line("reading")
    line.begin()
    line.tell("batch 1 of 4", 0.25)
    assert capsys.readouterr().err == "\rreading (25%, about 1 min 30 s left): batch 1 of 4"


@pytest.mark.parametrize("wrong", [1, "yes", 0])
def test_something_else_than_a_boolean_is_refused(wrong: Any) -> None:
    with pytest.raises(tn.OptionError, match=r"\(at 'progress'\)"):
        tn.fold(models.dense(), progress=wrong)
    with pytest.raises(tn.OptionError, match=r"\(at 'progress'\)"):
        tn.collect(models.dense(), X, progress=wrong)


def test_the_number_of_batches_is_what_the_data_says() -> None:
    model = models.dense()
    for data, expected in (
        (X, 7), ((X, X), 7), ([X, X], 2), ((x for x in [X]), None), (iter([X]), None),
    ):  # fmt: skip
        assert number_of_batches(model, data, 10) == expected


def test_a_study_is_shown_on_one_line_in_a_notebook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    event = Progress("finished", "none", 0, 1, 1, 6, metrics={"val_loss": 0.5})
    with told(None) as tell:
        assert tell is None  # in a pipe
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with told(None) as tell:
        assert tell is not None
        tell(event)
    said = capsys.readouterr().err
    assert re.search(r"study: 1 of 6 trials", said)
    assert screen(said).strip() == ""
