"""``truenorm demo``: the journey through all tools, and the folder that it writes.

It trains a network several times with BatchNormalization at different positions (a study), and
takes one of these models: what is wrong with it (diagnose), are its statistics true (recalibrate);
then where BatchNormalization goes, which mode it is in (inspect); in the end it folds the model for
deployment and writes the report. Every number it prints is measured in the run.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from truenorm._demo.tasks import TASKS, Task
from truenorm._diagnosis.diagnose import diagnose
from truenorm._errors import OptionError, OutputError
from truenorm._modes.inspect import inspect
from truenorm._records.files import replacing
from truenorm._records.recalibration import Gap
from truenorm._records.study import Study, Trial
from truenorm._records.study_drawings import recalibrated
from truenorm._records.tables import Record, Table, number, percent
from truenorm._rewrites.fold import fold
from truenorm._rewrites.replace import replace
from truenorm._statistics.collect import collect
from truenorm._statistics.recalibrate import gaps, recalibrate
from truenorm._study.experiment import POSITIONS, study
from truenorm._study.lock import LOCK
from truenorm._study.pool import Progress as Event
from truenorm.report import Chart, Section, comparison, learning_curves, picture, report, save
from truenorm.report import gaps as gaps_chart
from truenorm.report.study import sections


def run(*, data: str, seeds: int, out: Path, force: bool = False, resume: bool = False) -> None:
    """Run the demo and leave its study, model and report in a folder.

    Args:
        data: Name of a task in :data:`truenorm._demo.tasks.TASKS`.
        seeds: How many times each position is trained.
        out: The folder.
        force: Replace what an earlier demo left there (and nothing else).
        resume: Go on with a run that was stopped; finished trials are not repeated.

    Raises:
        OptionError: Both ``force`` and ``resume`` are given.
        OutputError: The folder is not empty, and neither is given, or it is not a demo's.
        MissingDependencyError: A package of ``truenorm[demo]`` is not installed.
    """
    task = TASKS[data]
    arrays = task.load()
    _prepare(out, force=force, resume=resume)
    tell = _Story(Console(highlight=False))
    found = _train(tell, task, arrays, data, seeds, out)
    trial = _most_misleading(found)
    model = keras.saving.load_model(out / "study" / trial.model)
    _what_is_wrong(tell, task, arrays, model, trial)
    parts = {part.heading: part for part in sections(found)}
    _are_the_statistics_true(tell, task, arrays, found, model, parts["Health of the statistics"])
    _where(tell, found)
    tell.sections.append(parts["Cost"])
    _which_mode(tell, task, arrays, model)
    _deploy(tell, arrays, model, out)
    tell.sections.append(parts["Settings"])
    title = f"BatchNormalization on {data.replace('_', ' ')}"
    save(out / "report.html", report(title, tell.answers, tell.sections))
    tell.begin(
        "Done",
        f"{out / 'model.keras'} is the folded model; it loads in plain Keras, without truenorm.",
        f"{out / 'report.html'} shows all of this with pictures; open it in a browser.",
    )


class _Story:
    """Tells each part on the terminal as it happens, and keeps it as a section of the report."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.sections: list[Section] = []
        self.answers: list[str] = []
        self._begun: tuple[str, tuple[str, ...]] = ("", ())

    def begin(self, heading: str, *sentences: str) -> None:
        """A part begins: what is asked, and how it will be answered."""
        self._begun = (heading, sentences)
        self.console.print()
        self.console.rule(f"[bold]{heading}", align="left")
        self._say(*sentences)

    def end(
        self,
        *content: Record | Table,
        shown: Sequence[Record | Table | Chart] = (),
        answer: str = "",
        said: Sequence[str] = (),
    ) -> None:
        """The part ends.

        Args:
            content: What was found.
            shown: What the report shows beside it, before it: pictures most of all.
            answer: The answer in a sentence; in the report all answers stand on top.
            said: What else there is to say, after the answer.
        """
        tables = [
            t for item in content for t in (item.tables() if isinstance(item, Record) else (item,))
        ]
        for table in tables:
            self.console.print()
            self.console.print(table)
        if answer:
            self.answers.append(answer)
            self.console.print()
            self._say(answer, *said)
        heading, sentences = self._begun
        self.sections.append(Section(heading, (*sentences, *said), (*shown, *tables)))

    def _say(self, *sentences: str) -> None:
        for sentence in sentences:
            self.console.print(sentence, markup=False, soft_wrap=not self.console.is_terminal)


def _train(tell: _Story, task: Task, arrays: Any, name: str, seeds: int, out: Path) -> Study:
    """The study, from which all that follows is taken."""
    times = "once" if seeds == 1 else f"{seeds} times"
    tell.begin(
        "What is trained",
        f"The data: {task.describe}.",
        f"The network: {task.network}, in three versions: without BatchNormalization, with it "
        f"before each activation (as its paper has it), with it after each activation. Each is "
        f"trained {times}, for {task.epochs} epochs. For one seed all three start from the same "
        f"kernels and see the same batches in the same order, so that only the position differs.",
    )
    with _progress(tell.console, seeds * len(POSITIONS) * task.epochs) as on_event:
        found = study(
            task.build,
            arrays,
            seeds=seeds,
            epochs=task.epochs,
            batch_size=task.batch_size,
            directory=out / "study",
            name=name,
            on_event=on_event,
        )
    tell.end()
    return found


def _what_is_wrong(tell: _Story, task: Task, arrays: Any, model: Any, trial: Trial) -> None:
    """Diagnose the trained model as its training left it."""
    (x, y), validation = arrays
    score = model.evaluate(*validation, verbose=0, return_dict=True)["accuracy"]
    tell.begin(
        "What is wrong with it?",
        f"One of these models, as fit left it: '{trial.position}', seed {trial.seed}, the one of "
        f"the best position whose moving statistics mislead most. On the validation data its "
        f"accuracy is {percent(score)}. diagnose() looks for what is wrong with its "
        f"BatchNormalization, on the training data.",
    )
    found = diagnose(model, x, y, batch_size=task.batch_size)
    tell.end(found, shown=(picture(found),))


def _are_the_statistics_true(
    tell: _Story, task: Task, arrays: Any, found: Study, model: Any, health: Section
) -> None:
    """Recalibrate the model in place, and measure its skew and its score before and after."""
    (x_train, _), (x_val, y_val) = arrays
    tell.begin(
        "Are its statistics true?",
        "In inference the layer uses the average that it moved along in training. Compared with "
        "the exact mean and variance of what each layer sees in inference over the whole training "
        "set, the average is off by the gaps below. recalibrate() puts the exact statistics in; "
        "no weight is trained.",
    )

    def measure() -> tuple[tuple[Gap, ...], dict[str, float]]:
        seen = gaps(model, collect(model, x_train, upstream="moving"))
        return seen, model.evaluate(x_val, y_val, verbose=0, return_dict=True)

    before, old = measure()
    recalibrate(model, x_train, upstream="population")
    after, new = measure()
    table = Table(
        "Moving statistics against the whole training set, before and after recalibration",
        ("layer", "mean off by (std)", "after", "scale off by (doublings)", "after"),
        tuple(
            (b.path, number(b.mean), number(a.mean), number(b.scale), number(a.scale))
            for b, a in zip(before, after, strict=True)
        ),
        (
            f"On the validation data: accuracy {percent(old['accuracy'])} before, "
            f"{percent(new['accuracy'])} after; loss {number(old['loss'], 4)} before, "
            f"{number(new['loss'], 4)} after.",
        ),
    )
    tell.end(
        table,
        shown=(*health.content, gaps_chart(before, after)),
        answer=(
            f"The same trained weights, two validation accuracies: {percent(old['accuracy'])} with "
            f"the moving statistics that {task.epochs} epochs of fit left, "
            f"{percent(new['accuracy'])} with the statistics of the whole training set "
            f"(recalibrate)."
        ),
        said=_of_all(found),
    )


def _of_all(found: Study) -> tuple[str, ...]:
    """What recalibration did to every trained model."""
    trials = recalibrated(found, found.metric)
    if len(trials) < 2:
        return ()
    before = [trial.history[found.metric][-1] for trial in trials]
    after = [trial.final[found.metric] for trial in trials]
    told = (
        f"{percent(statistics.fmean(values))} on average, {percent(min(values))} at worst"
        for values in (before, after)
    )
    return (
        "Over all {} trained models that have a BatchNormalization: {} with the moving statistics; "
        "{} recalibrated.".format(len(trials), *told),
    )


def _where(tell: _Story, found: Study) -> None:
    """What the study says about the positions."""
    tell.begin(
        "Where does BatchNormalization go?",
        "The versions are judged on the validation data, with each BatchNormalization's "
        "statistics computed over the whole training set: a moving average that lags behind "
        "would say more of its momentum than of the position.",
    )
    metrics = dict.fromkeys((found.metric, "val_loss"))
    curves = (learning_curves(found, metric, bands=True) for metric in metrics)
    answer, *said = found.verdict
    tell.end(
        *found.tables()[:-1],  # the last is the verdict
        shown=(comparison(found, found.metric), *curves),
        answer=answer,
        said=said,
    )


def _which_mode(tell: _Story, task: Task, arrays: Any, model: Any) -> None:
    """What each layer of the model did in every entry point."""
    x, y = (part[: task.batch_size] for part in arrays[1])
    tell.begin(
        "Which mode is it in?",
        "A copy of the same model is sent through every entry point of Keras, and what each layer "
        "really did is recorded. Nobody passes `training`: fit chooses it by itself.",
    )
    found = inspect(model, x, y)
    tell.end(found, shown=(picture(found),))


def _deploy(tell: _Story, arrays: Any, model: Any, out: Path) -> None:
    """Fold the model, prove and time it, and save it for plain Keras."""
    x = arrays[1][0]
    tell.begin(
        "Deploy it",
        "In inference each BatchNormalization is one multiplication and one addition per channel: "
        "fold() computes them into the neighbouring convolution or dense layer where that is "
        "exact, and proves it by comparing the outputs.",
    )
    folded = fold(model, probe=x)
    plain = replace(folded.model, to="keras").model if folded.left else folded.model
    with replacing(out / "model.keras") as temporary:
        plain.save(temporary)
    tell.end(folded, answer=_speed_up(model, plain, x))


@contextmanager
def _progress(console: Console, epochs: int) -> Generator[Callable[[Event], None]]:
    """A bar that advances with every epoch of every trial."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs,"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        main = bar.add_task("training", total=epochs)
        reached: dict[tuple[str, int], int] = {}

        def on_event(event: Event) -> None:
            trial = (event.position, event.seed)
            ended = event.kind in ("finished", "failed")
            reached[trial] = event.epochs if ended else event.epoch
            bar.update(
                main,
                completed=sum(reached.values()),
                description=f"training {event.position}, seed {event.seed}",
            )

        yield on_event


def _most_misleading(study: Study) -> Trial:
    """Of the best position with BatchNormalization the model that recalibration changes most."""
    position = _best_with_batch_normalization(study)
    done = [t for t in study.trials if t.position == position and t.error is None]

    def change(trial: Trial) -> float:
        return abs(trial.final[study.metric] - trial.history[study.metric][-1])

    return max(done, key=change)


def _best_with_batch_normalization(study: Study) -> str:
    if study.best != "none":
        return study.best
    others = [position for position in study.summaries if position != "none"]
    choose = min if study.lower_is_better else max
    return choose(others, key=lambda p: study.summaries[p][study.metric].mean)


def _speed_up(old: Any, new: Any, x: Any, pairs: int = 30) -> str:
    """Time both models in turn, so that a drift of the machine hits both."""

    def seconds(model: Any) -> float:
        start = time.perf_counter()
        model.predict_on_batch(x)
        return time.perf_counter() - start

    for model in (old, new):
        seconds(model)  # compiles
    ratios = sorted(seconds(old) / seconds(new) for _ in range(pairs))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (
        f"Folded, a batch of {len(x)} runs {middle:.2f} times as fast (median of {pairs} paired "
        f"runs; half of them between {low:.2f} and {high:.2f})."
    )


def _prepare(out: Path, *, force: bool, resume: bool) -> None:
    """Make the folder ready; what it holds is replaced only if asked, and only the demo's own."""
    if force and resume:
        raise OptionError(
            "--force starts again and --resume continues: they exclude each other",
            expected="at most one of them",
            received="--force and --resume",
        )
    if out.exists() and not out.is_dir():
        raise OutputError("The output is a file", where=str(out), expected="a folder")
    ours = (out / "study" / "study.json").is_file()
    if _holds_files(out) and not (ours and (force or resume)):
        raise OutputError(
            "The output folder is not empty" + (" and not a demo's" if force or resume else ""),
            where=str(out),
            remedy="--force replaces an earlier demo there, --resume goes on with a stopped one, "
            "--out names another folder",
        )
    try:
        if ours and force:
            for name in ("model.keras", "report.html"):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / "study")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            "The output folder cannot be made ready", where=str(out), received=str(error)
        ) from error


def _holds_files(folder: Path) -> bool:
    """Whether there is a file; a demo that was stopped early leaves a lock and half of one."""
    left = (".study.*.tmp*", LOCK)
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return any(not any(map(path.match, left)) for path in files)
