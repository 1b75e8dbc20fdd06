"""The report of a study: the verdict on top, and below it all that led to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from truenorm._records.study import Study, Trial
from truenorm._records.study_drawings import recalibrated
from truenorm._records.tables import Table, number
from truenorm.report.charts import comparison, learning_curves, picture
from truenorm.report.page import Section, report


def study_page(study: Study, title: str = "") -> str:
    """The report of a study as one self-contained HTML page.

    Args:
        study: The record, as :func:`truenorm.study` returns it.
        title: The page's title; the study's name where none is given.

    Returns:
        The page as text; :func:`truenorm.report.save` writes it.

    Raises:
        MissingDependencyError: Jinja2 or matplotlib is not installed.
    """
    return report(title or f"Study: {study.name}", study.verdict, sections(study))


def sections(study: Study) -> list[Section]:
    """The parts of the report, for pages that have more of them."""
    metrics = dict.fromkeys((study.metric, "val_loss"))
    known = {name for trial in study.trials for name in trial.history}
    curves = [learning_curves(study, m, bands=True) for m in metrics if m in known]
    tables = study.tables()
    parts = [
        Section("Comparison", (_counted(study),), (comparison(study, study.metric), *tables[:-1])),
        Section("Learning curves", (), tuple(curves)),
        Section("Cost", _cost_words(study), (_costs(study), *_unfoldable(study))),
        _health_part(study),
        Section("Settings", (), (_settings(study), *_repeat(study))),
    ]
    tests = _test_table(study)
    if tests is not None:
        parts.insert(1, Section("Test data", _TEST_WORDS, (tests,)))
    failures = _failures(study)
    if failures is not None:
        parts.insert(-1, Section("Trials that failed", (), (failures,)))
    return parts


_TEST_WORDS = (
    "A part of the data that decided nothing: neither which variant is best nor when to stop. It "
    "was looked at once, after each training.",
)


def _counted(study: Study) -> str:
    seeds = len({trial.seed for trial in study.trials})
    text = f"{len(study.summaries)} variants, {seeds} seeds, {len(study.trials)} trials."
    if study.margin is not None:
        text += (
            f" Differences smaller than {number(study.margin)} in {study.metric} were declared to "
            "be of no interest beforehand; the shaded band shows them."
        )
    return text


def _done(study: Study, name: str) -> list[Trial]:
    return [t for t in study.trials if t.position == name and t.error is None]


def _median(trials: Sequence[Trial], of: Callable[[Trial], float | None]) -> float | None:
    values = [value for trial in trials if (value := of(trial)) is not None]
    return float(np.median(values)) if values else None


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1000 * seconds)


def _costs(study: Study) -> Table:
    threshold = study.settings.get("threshold")
    lower = study.lower_is_better
    rows: list[tuple[str, ...]] = []
    for name in study.summaries:
        trials = _done(study, name)
        memory = _median(trials, lambda t: t.memory)
        plain = _median(trials, lambda t: t.predict_seconds)
        folded = _median(trials, lambda t: t.predict_folded_seconds)
        foldable = next((t.foldable for t in trials if t.foldable is not None), None)
        row = (
            name,
            str(trials[0].parameters) if trials else "–",
            _milliseconds(_median(trials, lambda t: t.step_seconds)),
            _milliseconds(plain),
            _milliseconds(folded),
            "–" if foldable is None else f"{foldable} of {trials[0].sites}",
            number(None if memory is None else memory / 2**20, 4),
            number(_median(trials, lambda t: t.seconds)),
        )
        if threshold is not None:
            row += (_to_threshold(trials, study.metric, threshold, lower=lower),)
        rows.append(row)
    columns = (
        *("variant", "parameters", "step (ms)", "predict (ms)", "predict folded (ms)"),
        *("folds", "peak memory (MiB)", "trial (s)"),
    )
    if threshold is not None:
        columns += (f"epochs to {number(threshold)}",)
    return Table("Cost: medians over the trials", columns, tuple(rows))


def _to_threshold(trials: Sequence[Trial], metric: str, threshold: float, *, lower: bool) -> str:
    """The median number of epochs, and how many trials never got there."""
    reached = [t.epochs_to(metric, threshold, lower=lower) for t in trials]
    known = [epoch for epoch in reached if epoch is not None]
    if not known:
        return "never"
    text = number(float(np.median(known)))
    return text if len(known) == len(trials) else f"{text} ({len(known)} of {len(trials)})"


def _cost_words(study: Study) -> tuple[str, ...]:
    if all(t.predict_seconds is None for t in study.trials):
        return ()
    return (
        "The times of predict are of one batch, measured in the trials of the first seed, in turn "
        "with those of the folded model.",
    )


def _unfoldable(study: Study) -> tuple[Table, ...]:
    rows = tuple(
        (name, reason)
        for name in study.summaries
        for reason in next((t.left for t in _done(study, name) if t.left), ())
    )
    if not rows:
        return ()
    return (Table("What cannot be folded", ("variant", "layer and reason"), rows),)


def _health_part(study: Study) -> Section:
    pictures = (picture(study.drawing("statistics")),) if recalibrated(study, study.metric) else ()
    return Section("Health of the statistics", _health_words(study), (*pictures, _health(study)))


def _health(study: Study) -> Table:
    lower = study.lower_is_better
    rows: list[tuple[str, ...]] = []
    for name in study.summaries:
        trials = _done(study, name)
        finals = [t.final.get(study.metric, np.nan) for t in trials]
        last = [t.history.get(study.metric, (np.nan,))[-1] for t in trials]
        best = [t.best(study.metric, lower=lower) for t in trials]
        rows.append(
            (
                name,
                number(_median(trials, lambda t: t.skew_before)),
                number(_median(trials, lambda t: t.skew_after)),
                number(float(np.nanmean(last)) if np.isfinite(last).any() else None, 4),
                number(float(np.nanmean(finals)) if np.isfinite(finals).any() else None, 4),
                number(float(np.nanmean(best)) if np.isfinite(best).any() else None, 4),
            )
        )
    return Table(
        f"Moving statistics against the training set's, and {study.metric} with both",
        (
            *("variant", "skew", "skew recalibrated", "with moving statistics"),
            *("as judged", "best epoch"),
        ),
        tuple(rows),
        ("The best epoch is chosen with the data that judges it, so it flatters all variants.",),
    )


def _health_words(study: Study) -> tuple[str, ...]:
    if all(t.skew_before is None for t in study.trials):
        return ()
    return (
        "The skew is the largest distance of a layer's moving statistics from those of the whole "
        "training set: of means in standard deviations, of deviations in doublings; medians over "
        "the trials.",
    )


def _test_table(study: Study) -> Table | None:
    name = study.metric.removeprefix("val_")
    rows: list[tuple[str, ...]] = []
    for variant in study.summaries:
        values = [t.test[name] for t in _done(study, variant) if name in t.test]
        if values:
            mean, spread = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else np.nan
            rows.append((variant, number(float(mean), 4), number(float(spread), 2)))
    if not rows:
        return None
    columns = ("variant", "mean over seeds", "standard deviation")
    return Table(f"{name} on the test data", columns, tuple(rows))


def _failures(study: Study) -> Table | None:
    rows = tuple(
        (trial.position, str(trial.seed), trial.failure or "error", trial.error.splitlines()[0])
        for trial in study.trials
        if trial.error
    )
    return Table("Failed trials", ("variant", "seed", "kind", "reason"), rows) if rows else None


def _settings(study: Study) -> Table:
    rows = [
        (f"{key}: {inner}" if inner else key, _said(value))
        for key, given in study.settings.items()
        if key not in ("command", "date")
        for inner, value in (given.items() if isinstance(given, dict) else [("", given)])
    ]
    return Table("Everything that decides the result", ("setting", "value"), tuple(rows))


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _repeat(study: Study) -> tuple[Table, ...]:
    """When it was run, and how to run it again."""
    command, date = study.settings.get("command"), study.settings.get("date")
    when = (f"Run on {date}.",) if date else ()
    how = (Table("The command that repeats it", (), (), (str(command), *when)),)
    return how if command else ()
