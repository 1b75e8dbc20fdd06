"""A study as its user meets it: paired trials, resuming, and workers that go wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import truenorm
from truenorm._errors import StudyError
from truenorm._records.files import owned_name, replacing
from truenorm._records.study import Study
from truenorm._study import trial as worker
from truenorm._study.datasets import Parts
from truenorm._study.experiment import study
from truenorm._study.folder import Spec, read_data, read_result, write_result
from truenorm._study.plan import Plan, read_plan
from truenorm._study.pool import Progress
from truenorm._study.variants import Variant

pytestmark = pytest.mark.any_backend

POSITIONS = ("before_activation", "after_activation")
SPEC = Spec("hash", "none", 3, 2, 4, False, False, False, "float32", "float32")


def build(units: int = 6) -> Any:
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(units),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def arrays() -> Any:
    x = np.random.default_rng(0).normal(size=(90, 5)).astype("float32")
    y = (x[:, 0] + x[:, 1] > 0).astype("int32")
    return (x[:60], y[:60]), (x[60:], y[60:])


def run(folder: Path | None, **options: Any) -> Study:
    options = {"positions": POSITIONS, "seeds": 2, "epochs": 2, "batch_size": 16} | options
    return study(
        options.pop("build", build), options.pop("data", arrays()), directory=folder, **options
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    """A finished study and its folder; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("study") / "new"
    return folder, run(folder)


@pytest.fixture
def folder(original: tuple[Path, Study], tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(original[0], copy)
    return copy


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every process that the study starts."""
    started: list[Any] = []

    class Recording(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recording)
    return started


def training(folder: Path, spec: Spec) -> worker.Training:
    return worker.Training(read_plan(folder), spec, read_data(folder))


def specs(folder: Path) -> list[Spec]:
    return [Spec.read(path) for path in sorted((folder / "trials").glob("*.spec.json"))]


# --- the experiment ----------------------------------------------------------------------------


def test_every_trial_is_there(original: tuple[Path, Study]) -> None:
    folder, result = original
    assert [(t.position, t.seed) for t in result.trials] == [
        (p, s) for p in POSITIONS for s in (0, 1)
    ]
    for trial in result.trials:
        assert trial.error is None
        assert (trial.sites, trial.parameters) == (1, 5 * 6 + 6 + 4 * 6 + 6 * 2 + 2)
        assert set(trial.history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
        assert all(len(values) == 2 for values in trial.history.values())
        model = keras.saving.load_model(folder / trial.model)
        loss, _ = model.evaluate(*arrays()[1], verbose=0)
        assert loss == pytest.approx(trial.history["val_loss"][-1], rel=1e-4)
        truenorm.recalibrate(model, arrays()[0], upstream="population")
        loss, accuracy = model.evaluate(*arrays()[1], verbose=0)
        assert trial.final == {
            "val_loss": pytest.approx(loss, rel=1e-4),
            "val_accuracy": pytest.approx(accuracy),
        }
    assert result.metric == "val_accuracy"
    assert result.settings["backend"] == keras.config.backend()
    assert not list(folder.rglob("*.tmp*"))


def test_positions_of_a_seed_start_from_the_same_weights(original: tuple[Path, Study]) -> None:
    folder, _ = original
    spec = specs(folder)[0]
    starts: dict[tuple[str, int], list[np.ndarray]] = {}
    for position in POSITIONS:
        for seed in (0, 1):
            model = training(folder, replace(spec, position=position, seed=seed)).model()
            assert model.compiled
            kept = [w for w in model.layers if "BatchNormalization" not in type(w).__name__]
            starts[position, seed] = [
                np.asarray(keras.ops.convert_to_numpy(v)) for layer in kept for v in layer.variables
            ]
    for seed in (0, 1):
        before, after = (starts[position, seed] for position in POSITIONS)
        for value, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(value, other)
    assert not np.array_equal(starts[POSITIONS[0], 0][0], starts[POSITIONS[0], 1][0])


def test_batches_are_decided_by_seed_and_epoch() -> None:
    x = np.arange(18)
    batches = worker.Batches(x, x, 4, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.start(epoch)
        assert len(batches) == 4
        orders.append(np.concatenate([batches[i][0] for i in range(4)]))
    assert len(set(orders[0])) == 16
    np.testing.assert_array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], np.random.default_rng([3, 0]).permutation(18)[:16])
    plain = worker.Batches(x, x, 4, seed=None)
    np.testing.assert_array_equal(np.concatenate([plain[i][0] for i in range(len(plain))]), x)


def test_fit_sees_these_batches_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    class Recording(worker._Epochs):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            seen.append(logs["loss"])

    monkeypatch.setattr(worker, "_Epochs", Recording)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.0), "mean_absolute_error")
    x, y = np.zeros((18, 1), "float32"), np.arange(18, dtype="float32")[:, None]
    plan = Plan(build, None, {"none": Variant()})
    one = worker.Training(plan, SPEC, Parts((x, y), (x, y)))
    one.fit(model, lambda *_: None)
    expected: list[float] = []
    for epoch in (0, 1):
        order = np.random.default_rng([SPEC.seed, epoch]).permutation(18)[:16]
        expected += [float(np.mean(order[: 4 * k])) for k in (1, 2, 3, 4)]  # Keras's running mean
    assert seen == pytest.approx(expected)


def test_the_parent_keeps_its_settings(original: tuple[Path, Study]) -> None:
    def state() -> tuple[Any, ...]:
        backend = keras.config
        return (
            backend.floatx(),
            backend.dtype_policy().name,
            backend.image_data_format(),
            backend.epsilon(),
            dict(os.environ),
            threading.active_count(),
            Path.cwd(),
        )

    before = state()
    run(original[0])
    assert state() == before


# --- resuming ----------------------------------------------------------------------------------


def test_a_finished_study_repeats_nothing(
    original: tuple[Path, Study], processes: list[Any]
) -> None:
    folder, first = original
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert run(folder, name="study") == first
    assert processes == []
    later = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert {p for p in later if later[p] != times.get(p)} == {folder / ".lock"}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's
def test_broken_results_are_run_again_and_give_the_same(
    original: tuple[Path, Study], folder: Path, processes: list[Any]
) -> None:
    half = folder / "trials/before_activation-seed0.json"
    half.write_text(half.read_text()[:-40])
    foreign = folder / "trials/after_activation-seed1.json"
    foreign.write_text(foreign.read_text().replace('"seed": 1', '"seed": 0'))
    events: list[Progress] = []
    with pytest.warns(UserWarning, match="it was renamed to .*json.broken and the trial is run"):
        result = run(folder, on_event=events.append)
    assert len(processes) == 2
    assert len(list(folder.glob("trials/*.broken"))) == 2
    assert {(e.position, e.seed) for e in events} == {(POSITIONS[0], 0), (POSITIONS[1], 1)}
    kinds = [e.kind for e in events if e.seed == 1]
    assert kinds == ["started", "epoch", "epoch", "finished"]
    assert [e.epoch for e in events if e.seed == 1 and e.kind == "epoch"] == [1, 2]
    assert (events[-1].done, events[-1].total) == (4, 4)
    for trial, before in zip(result.trials, original[1].trials, strict=True):
        for name, values in trial.history.items():
            assert values == pytest.approx(before.history[name], rel=1e-4), name
    assert not list(folder.rglob("*.tmp*"))


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"epochs": 3}, "epochs differ"),
        ({"seeds": 3, "batch_size": 8}, "batch_size, seeds differ"),
        ({"build": lambda: build(7)}, "model differ"),
        ({"data": (arrays()[0], (arrays()[1][0] + 1, arrays()[1][1]))}, "the data differs"),
    ],
)
def test_another_study_in_the_folder(
    original: tuple[Path, Study], options: dict[str, Any], difference: str
) -> None:
    problem = re.escape(f"This folder holds another study: {difference} (at '{original[0]}').")
    with pytest.raises(StudyError, match=f"^{problem} .* Remedy: give another folder, or the"):
        run(original[0], **options)


def test_settings_that_cannot_be_read(folder: Path) -> None:
    (folder / "study.json").write_text("{")
    with pytest.raises(StudyError, match=r"^The settings of the study in this folder cannot be"):
        run(folder)


def test_no_cut_of_a_result_passes_for_a_result(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    values = {"loss": (1.0, float("nan"))}
    finals = {"val_loss": float("inf"), "val_accuracy": 0.5}
    trial = worker.Trial("none", 3, values, finals, 1, 2, 1.5, "")
    write_result(tmp_path, SPEC, trial)
    path = tmp_path / SPEC.file(".json")
    whole = read_result(tmp_path, SPEC)
    assert whole is not None
    np.testing.assert_equal(whole.history, values)
    np.testing.assert_equal(whole.final, {"val_loss": float("nan"), "val_accuracy": 0.5})
    text = path.read_text()
    assert "NaN" not in text

    def refused(spec: Spec = SPEC) -> None:
        with pytest.warns(UserWarning, match="is not whole or not of this study"):
            assert read_result(tmp_path, spec) is None
        assert not path.exists()
        path.write_text(text)

    refused(replace(SPEC, identity="other"))
    refused(replace(SPEC, epochs=3))
    refused(replace(SPEC, keep_model=True))
    for broken in (*(text[:n] for n in range(len(text))), "[" * 100_000, "null", "[]", "{}"):
        path.write_text(broken)
        refused()
    content = json.loads(text)
    for change in (
        {"history": {}},
        {"final": {}},
        {"final": {"val_loss": "a"}},
        {"history": {"loss": ["a", 1]}},
        {"history": 3},
        {"more": 1},
    ):
        path.write_text(json.dumps(content | change))
        refused()


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- workers that go wrong ---------------------------------------------------------------------


def forget(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"trials/{name}.json").unlink()


def test_a_study_without_a_folder_works_in_one_that_can_be_found_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    machine, _, number = owned_name().split("-")
    abandoned = tmp_path / f"truenorm-{machine}-999999999-{number}"
    abandoned.mkdir()
    seen = set[Path]()
    run(None, seeds=1, epochs=1, runner="here", on_event=lambda _: seen.update(tmp_path.iterdir()))
    (folder,) = seen  # the abandoned one is gone
    assert re.fullmatch(rf"truenorm-[0-9a-f]+-{os.getpid()}-[0-9a-f]+", folder.name)
    assert not list(tmp_path.iterdir())


def test_a_killed_worker_fails_its_trial_only(folder: Path) -> None:
    forget(folder, "after_activation-seed0")

    def kill(event: Progress) -> None:
        if event.kind == "started":
            os.kill(event.pid, signal.SIGKILL)

    result = run(folder, on_event=kill)
    failed = [t for t in result.trials if t.error is not None]
    assert [(t.position, t.seed, t.history) for t in failed] == [("after_activation", 0, {})]
    assert failed[0].error is not None
    assert failed[0].error.startswith("the worker was ended by signal 9 (out of memory?)")
    assert result.summaries["before_activation"]["val_loss"].n == 1
    assert any(s.startswith("Seed 0 is left out at every position") for s in result.verdict)


def failing_in_trials() -> Any:
    if "pytest" not in sys.modules:
        raise ValueError("not in this process")
    return build()


def test_a_worker_that_raises_says_why(folder: Path) -> None:
    forget(folder, "after_activation-seed0")
    result = run(folder, build=failing_in_trials)
    error = next(t.error for t in result.trials if t.error)
    assert error.startswith("the worker ended with exit code 1\n")
    assert error.endswith("ValueError: not in this process")


def test_trials_that_take_too_long(processes: list[Any]) -> None:
    with pytest.raises(StudyError) as caught:
        run(None, seeds=1, timeout=0.1)
    message = str(caught.value)
    assert message.startswith(
        "No trial of before_activation and of after_activation finished (at 'before_activation, "
        "seed 0')."
    )
    assert "2 failed; the first: the trial took longer than 0.1 s and was ended" in message
    assert [p.returncode for p in processes] == [-signal.SIGKILL] * 2
    assert not Path(processes[0].args[-1]).exists()  # the temporary folder is gone


def interrupt(event: Progress) -> None:
    """Ctrl-C, a moment after a worker has started, while the study waits."""
    if event.kind == "started":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()


def fail(event: Progress) -> None:
    raise BrokenPipeError(event.kind)


@pytest.mark.parametrize(
    ("handler", "error"), [(interrupt, KeyboardInterrupt), (fail, BrokenPipeError)]
)
def test_what_ends_a_study_leaves_no_process_and_keeps_results(
    folder: Path,
    processes: list[Any],
    handler: Callable[[Progress], None],
    error: type[BaseException],
) -> None:
    forget(folder, "after_activation-seed0", "before_activation-seed1")
    with pytest.raises(error):
        run(folder, on_event=handler, workers=1)
    assert [p.returncode for p in processes] == [-signal.SIGTERM]
    assert threading.active_count() == 1 or all(
        "ThreadPool" not in t.name for t in threading.enumerate()
    )
    kept = [spec for spec in specs(folder) if read_result(folder, spec) is not None]
    assert {(s.position, s.seed) for s in kept} == {(POSITIONS[0], 0), (POSITIONS[1], 1)}
