"""Folders of studies: one driver, reading, merging; and the command line over them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from test_study import POSITIONS, arrays, build

import truenorm as tn
from truenorm._records.study import Study
from truenorm._study.experiment import study
from truenorm._study.live import View
from truenorm._study.load_and_merge import load, merge
from truenorm._study.lock import only_driver
from truenorm._study.pool import NO_ROOM, Event, Progress, failed, run_all
from truenorm._study.settings import specs_of

pytestmark = pytest.mark.any_backend


def run(folder: Path | None, **options: Any) -> Study:
    chosen: dict[str, Any] = {
        "positions": POSITIONS,
        "seeds": 2,
        "epochs": 1,
        "batch_size": 16,
        "runner": "here",
        "directory": folder,
    }
    chosen |= options
    return study(chosen.pop("build", build), chosen.pop("data", arrays()), **chosen)


def regression() -> Any:
    model = build()
    model.pop()
    model.add(keras.layers.Dense(1))
    model.compile("adam", "mse")
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Study]:
    """One study whose seeds were divided: two folders, and the first's record."""
    first, second = (tmp_path_factory.mktemp("s") / name for name in ("first", "second"))
    result = run(first, seeds=(0, 1), margin=0.1)
    run(second, seeds=(2, 3), margin=0.1)
    return first, second, result


def test_the_margin_decides_what_is_equivalent() -> None:
    x, _ = arrays()[0]
    wide, narrow = (
        run(None, build=regression, data=((x, x[:, 0]), (x, x[:, 0])), seeds=4, margin=margin)
        for margin in (100.0, 1e-9)
    )
    assert wide.margin == 100.0
    (shown,), (not_shown,) = (
        [c for c in result.comparisons if c.metric == result.metric] for result in (wide, narrow)
    )
    assert shown.difference == not_shown.difference
    assert shown.p_equivalent is not None
    assert shown.p_equivalent < 1e-3
    assert not_shown.p_equivalent is not None
    assert not_shown.p_equivalent > 0.05
    assert any("are equivalent within 100 in" in s for s in wide.verdict)
    assert not any("are equivalent" in s for s in narrow.verdict)


def test_a_folder_says_the_same_as_the_run(both: tuple[Path, Path, Study]) -> None:
    folder, _, result = both
    assert load(folder) == result


def test_a_study_called_again_keeps_its_date_and_command(
    both: tuple[Path, Path, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, result = both
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, \d\d:\d\d UTC", result.settings["date"])
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps({**about, "date": "2020-01-02, 03:04 UTC"}))
    monkeypatch.setattr(sys, "argv", ["another.py"])
    again = run(folder, seeds=(0, 1), margin=0.1)
    (folder / "about.json").write_text(json.dumps(about))
    assert again.settings["date"] == "2020-01-02, 03:04 UTC"
    assert again.settings["command"] == result.settings["command"]


def test_merging_adds_the_others_trials(both: tuple[Path, Path, Study], tmp_path: Path) -> None:
    import shutil

    target = tmp_path / "merged"
    shutil.copytree(both[0], target)
    merge(target, both[1])
    merged = load(target)
    assert [(t.position, t.seed) for t in merged.trials] == [
        (p, s) for p in POSITIONS for s in (0, 1, 2, 3)
    ]
    theirs = load(both[1])
    assert [t for t in merged.trials if t.seed > 1] == list(theirs.trials)
    merge(target, both[1])  # again: nothing new
    assert load(target) == merged
    other = tmp_path / "other"
    run(other, epochs=2, seeds=1)
    with pytest.raises(tn.StudyError, match="different studies: epochs, margin differ"):
        merge(target, other)


def test_a_study_that_is_not_finished_says_so(
    both: tuple[Path, Path, Study], tmp_path: Path
) -> None:
    import shutil

    target = tmp_path / "part"
    shutil.copytree(both[0], target)
    (target / "trials" / f"{POSITIONS[1]}-seed1.json").unlink()
    assert load(target).verdict[-1] == "The study is not finished: 1 of 4 trials are missing."


def test_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(tn.StudyError, match=r"^There is no study in this folder"):
        load(tmp_path)
    (tmp_path / "study.json").write_text('{"seeds": [0]}')
    with pytest.raises(tn.StudyError, match=r"^There is no study in this folder"):
        load(tmp_path)


def test_the_second_driver_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from truenorm._study.lock import only_driver\n"
        f"with only_driver(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(tn.StudyError) as caught:
            run(tmp_path)
        assert str(caught.value).startswith(
            f"Another process is running a study in this folder (at '{tmp_path}'). Received: "
            f"process {holder.pid}."
        )
    finally:
        holder.kill()
        holder.communicate()
    with only_driver(tmp_path):  # the killed one holds nothing
        pass


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_build_that_fails_in_a_trial_is_a_result(tmp_path: Path) -> None:
    def data(seed: int) -> Any:
        if seed == 1:
            raise FileNotFoundError("part-1 is missing")
        return arrays()

    result = run(tmp_path, data=data, seeds=(0, 1, 2))
    broken = [t for t in result.trials if t.error]
    assert [(t.seed, t.failure) for t in broken] == [(1, "error"), (1, "error")]
    assert broken[0].error is not None
    assert broken[0].error.splitlines()[0] == "the trial raised FileNotFoundError"
    assert len(list(tmp_path.glob("trials/*.failed.json"))) == 2
    assert load(tmp_path) == result
    assert any(s.startswith("Seed 1 is left out at every position") for s in result.verdict)


def test_data_of_unlike_lengths_is_told() -> None:
    def data(seed: int) -> Any:
        (x, y), validation = arrays()
        return (x[: 32 + 16 * seed], y[: 32 + 16 * seed]), validation

    result = run(None, data=data)
    assert result.verdict[-1] == (
        "Caution: the training data is not of the same length with every seed (steps of a trial: 2 "
        "to 3 in before_activation; 2 to 3 in after_activation), so that the spread between seeds "
        "is also one of lengths."
    )


def test_variants_that_are_the_same_are_told() -> None:
    """An A/A study: bit for bit the same, so nothing can be shown."""
    result = run(None, variants={"one": None, "two": lambda m: m})
    assert result.verdict[1:] == (
        "one and two gave the same validation accuracy in every seed.",
        "Caution: one and two are the same model with the same settings, so that any difference "
        "between them is chance.",
    )


def test_weights_that_do_not_pair_are_told() -> None:
    def unlike() -> Any:
        model = build()
        model.layers[0].kernel.assign(np.random.default_rng().normal(size=(5, 6)))
        return model

    result = run(None, build=unlike)
    assert result.verdict[-1].startswith("Caution: with seed 0, 1 build did not give the same")


class Failing:
    """A runner whose first trial finds no room on the disk."""

    def __init__(self) -> None:
        import queue

        self.events: Any = queue.SimpleQueue[Event]()
        self.stopped = False

    def start(self, todo: Any) -> None:
        trial = failed(todo[0], "the worker ended with exit code 1", seconds=1, lines=[NO_ROOM[0]])
        self.events.put(("ended", todo[0], 1, trial))

    def stop(self) -> None:
        self.stopped = True


def test_a_full_disk_ends_the_study_with_one_message(
    both: tuple[Path, Path, Study], tmp_path: Path
) -> None:
    specs = specs_of(json.loads((both[0] / "study.json").read_text()), keep_models=False)
    runner = Failing()
    with pytest.raises(tn.OutputError, match=r"No space left.*see that the disk has room"):
        run_all(tmp_path, specs, runner, on_event=None, finished=())
    assert runner.stopped


def test_kinds_of_failure(both: tuple[Path, Path, Study]) -> None:
    spec = specs_of(json.loads((both[0] / "study.json").read_text()), keep_models=False)[0]
    words = ["Traceback", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate"]
    trial = failed(spec, "the worker ended with exit code 1", seconds=1, lines=words)
    assert trial.failure == "memory"
    assert trial.error is not None
    assert trial.error.splitlines()[0] == (
        "the worker ended with exit code 1: there was not enough memory"
    )


# --- on the terminal ---------------------------------------------------------------------------


def events() -> Iterator[Progress]:
    yield Progress("started", "a", 0, 1, 2, 6)
    yield Progress("epoch", "a", 0, 1, 2, 6, 3, 9, {"val_accuracy": 0.5})
    yield Progress("finished", "b", 0, 2, 3, 6, metrics={"val_loss": 1.0, "val_accuracy": 0.75})
    yield Progress("failed", "c", 0, 3, 4, 6, error="killed")


def test_the_view_shows_means_and_no_tests() -> None:
    view = View()
    for event in events():
        view.update(event)
    first, *rest = view.lines()
    assert re.fullmatch(r"4 of 6 trials, 1 failed, about \d+ s left", first)
    assert rest == [
        "  a, seed 0: epoch 3 of 9  (val_accuracy 0.5)",
        "mean val_accuracy so far (trials): b 0.75 (1)",
    ]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "truenorm", "study", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of the command's; TensorFlow may say something when it is loaded."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("truenorm: ")]
    assert done.stderr.endswith(line + "\n")
    return line


@pytest.mark.long
def test_the_command_runs_a_study_and_shows_it(tmp_path: Path) -> None:
    x, y = arrays()[0]
    np.savez(tmp_path / "data.npz", x=x, y=y)
    folder, page = tmp_path / "out", tmp_path / "report.html"
    done = command(
        *("mlp:4", "--data", str(tmp_path / "data.npz"), "--epochs", "1", "--out", str(folder)),
        *("--seeds", "2", "--positions", "none,before_activation", "--margin", "0.5"),
        *("--runner", "here", "--report", str(page)),
    )
    assert done.returncode == 0, done.stderr
    assert "finished none, seed 1: 3 of 4 trials" in done.stderr
    assert "Verdict" in done.stdout
    text = page.read_text("utf-8")
    assert "truenorm study mlp:4" in text
    shown = command("show", str(folder), "--json")
    assert shown.returncode == 0, shown.stderr
    content = json.loads(shown.stdout)
    assert content["settings"]["margin"] == content["margin"] == 0.5
    assert len(content["trials"]) == 4
    wrong = command("show", str(tmp_path))
    assert wrong.returncode == 2
    assert said(wrong).startswith("truenorm: There is no study in this folder")
    nothing = command(
        "mlp:4", "--data", "wine", "--epochs", "1", "--out", str(folder), "--margin", "0"
    )
    assert nothing.returncode == 2
    assert said(nothing).startswith("truenorm: The margin is not a difference (at 'margin').")
