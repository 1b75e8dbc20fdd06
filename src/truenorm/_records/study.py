"""A controlled experiment: its runs, their comparison, the verdict."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from truenorm._errors import OptionError
from truenorm._records.drawings.drawing import Drawing, Drawn, plot
from truenorm._records.tables import Record, Table, counted, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

View = Literal["differences", "values", "curves", "statistics"]
"""What there is to see of a study."""

_LOWER_IS_BETTER = (
    *("loss", "error", "mae", "mse", "mape", "msle", "entropy", "divergence", "hinge", "poisson"),
    *("logcosh", "log_cosh", "perplexity", "false"),
)


def lower_is_better(metric: str) -> bool:
    """Whether a metric measures something bad, by the words that Keras uses for such metrics."""
    return any(word in metric for word in _LOWER_IS_BETTER)


@dataclass(frozen=True, repr=False)
class Trial(Record):
    """One training run: one position, one seed.

    Args:
        position: Where BatchNormalization was, or the variant's name.
        seed: Decides initial weights and the order of the batches.
        history: Keras's history: per metric its value after each epoch (``val_`` for validation),
            with the moving statistics as training left them.
        final: The validation metrics that the study judges by, under the same names: after the
            last epoch, with recalibrated statistics unless the study was told otherwise.
        sites: How many BatchNormalization sites the model had.
        parameters: Number of the model's parameters.
        seconds: Time of the run, in seconds, with start and compilation.
        model: File of the trained model, relative to the study's folder.
        error: None, or why the run failed (then the history is empty).
        failure: None, or the kind of failure: ``timeout``, ``memory``, ``killed`` or ``error``.
        stopped: Whether a callback ended the training before the last epoch.
        steps: Training steps in all.
        step_seconds: Median time of a training step, in seconds.
        memory: Peak memory of the process, in bytes.
        skew_before: How far the moving statistics were from the training set's after training: of
            means in standard deviations, of deviations in doublings, the largest of all.
        skew_after: The same after recalibration.
        foldable: How many BatchNormalization can be folded; None where it was not measured.
        left: Why the others cannot, one reason each.
        predict_seconds: Median time of ``predict`` on one batch.
        predict_folded_seconds: The same for the folded model.
        test: Metrics on the test part of the data, which decide nothing.
        start: Hash of the weights before training, as ``build`` made them.
    """

    position: str
    seed: int
    history: Mapping[str, tuple[float, ...]]
    final: Mapping[str, float]
    sites: int
    parameters: int
    seconds: float
    model: str
    error: str | None = None
    failure: str | None = None
    stopped: bool = False
    steps: int = 0
    step_seconds: float | None = None
    memory: int | None = None
    skew_before: float | None = None
    skew_after: float | None = None
    foldable: int | None = None
    left: tuple[str, ...] = ()
    predict_seconds: float | None = None
    predict_folded_seconds: float | None = None
    test: Mapping[str, float] = field(default_factory=dict[str, float])
    start: str = ""

    def best(self, metric: str, *, lower: bool) -> float:
        """The best value of a metric over the epochs; NaN if there is none."""
        values = [v for v in self.history.get(metric, ()) if math.isfinite(v)]
        return (min if lower else max)(values, default=math.nan)

    def epochs_to(self, metric: str, threshold: float, *, lower: bool) -> int | None:
        """The first epoch whose metric is as good as the threshold; None if none is."""
        for epoch, value in enumerate(self.history.get(metric, ()), start=1):
            if (value <= threshold) if lower else (value >= threshold):
                return epoch
        return None

    def summary(self) -> str:
        """Which trial, and how it ended."""
        ended = "failed" if self.error else ", ".join(f"{k} {v:.4g}" for k, v in self.final.items())
        return f"of {self.position}, seed {self.seed}: {ended}"

    def tables(self) -> Sequence[Table]:
        """The metrics that the study judges by."""
        rows = tuple((name, number(value, 4)) for name, value in self.final.items())
        return (Table(f"{self.position}, seed {self.seed}", ("metric", "value"), rows),)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% confidence interval (Student's t; low and high None if n=1).

    Args:
        mean: The mean, in the metric's units.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two positions compared over the same seeds: the paired difference ``first - second``.

    Args:
        metric: Which metric, as in Keras's history.
        first: A position.
        second: Another position.
        difference: Mean and interval of the paired difference, in the metric's units.
        p_value: Of the paired t-test, two-sided.
        p_adjusted: The same after Holm's correction for all pairs of positions of this metric.
        p_flips: Of the exact sign-flip test, two-sided, not corrected.
        narrow: The 90% interval, which decides about equivalence; None without a margin.
        p_equivalent: That the difference is not smaller than the margin (two one-sided tests),
            after Holm's correction; None without a margin.
        detectable: The true difference that this many seeds show in 80% of all cases.
        seeds_needed: Seeds in a new study that concludes in 80% of all cases; None if that is more
            than 1,000 or cannot be said.
    """

    metric: str
    first: str
    second: str
    difference: Interval
    p_value: float | None
    p_adjusted: float | None
    p_flips: float | None = None
    narrow: Interval | None = None
    p_equivalent: float | None = None
    detectable: float | None = None
    seeds_needed: int | None = None


@dataclass(frozen=True, repr=False)
class Study(Record, Drawn):
    """A controlled experiment over positions and seeds, and what it shows.

    Args:
        name: What was studied.
        settings: All that decides the result: epochs, batch size, seeds, backend, versions.
        trials: Every run.
        summaries: Per position, per metric, mean and interval over the seeds.
        comparisons: Every pair of positions, per metric.
        metric: The metric that decides.
        best: The position whose mean of that metric is best, shown or not.
        winner: That position if it is shown to differ from each other one, else None.
        verdict: The result in sentences.
        margin: The smallest difference of interest in that metric, in its units; None if no
            equivalence was asked for.
    """

    name: str
    settings: Mapping[str, Any]
    trials: tuple[Trial, ...]
    summaries: Mapping[str, Mapping[str, Interval]]
    comparisons: tuple[Comparison, ...]
    metric: str
    best: str
    winner: str | None
    verdict: tuple[str, ...]
    margin: float | None = None

    @property
    def lower_is_better(self) -> bool:
        """Whether small values of the deciding metric are good."""
        return lower_is_better(self.metric)

    def report(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Write the study as one HTML page that needs nothing else: :mod:`truenorm.report`.

        Args:
            path: The file.
            title: The page's title; the study's name where none is given.

        Raises:
            OutputError: The file cannot be written; what was there is unchanged.
            MissingDependencyError: Jinja2 or matplotlib is not installed.
        """
        reports: Any = importlib.import_module("truenorm.report")  # a row above: only when asked
        reports.save(path, reports.study_page(self, title))

    def summary(self) -> str:
        """How many trials, and which variant won."""
        ended = "no winner" if self.winner is None else f"{self.winner} is best"
        return f"'{self.name}': {counted(len(self.trials), 'trial')}, {ended}"

    def tables(self) -> Sequence[Table]:
        """The positions, their paired differences, and the verdict."""
        metrics = tuple(dict.fromkeys(name for row in self.summaries.values() for name in row))
        positions = Table(
            f"{self.name}: mean over seeds [95% interval]",
            ("position", "seeds", *metrics),
            tuple(
                (
                    position,
                    str(max(i.n for i in row.values())),
                    *(interval(possible_mean(self, position, m)) for m in metrics),
                )
                for position, row in self.summaries.items()
            ),
        )
        pairs = Table(
            f"{self.name}: paired differences, same seeds [95% interval]",
            ("metric", "difference", "mean", "p", "p (Holm)"),
            tuple(
                (
                    c.metric,
                    f"{c.first} − {c.second}",
                    interval(c.difference),
                    number(c.p_value, 2),
                    number(c.p_adjusted, 2),
                )
                for c in (possible(self, c) for c in self.comparisons)
            ),
        )
        return (positions, pairs, self._other_tests(), Table("Verdict", (), (), self.verdict))

    def drawing(self, view: View = "differences", metric: str | None = None) -> Drawing:
        """One view of the study, as data; see :meth:`plot`."""
        from truenorm._records import study_drawings

        views = {name: getattr(study_drawings, name) for name in get_args(View)}
        if view not in views:
            raise OptionError(
                "A study has no such view",
                where="view",
                expected="one of " + ", ".join(f"'{name}'" for name in views),
                received=repr(view),
            )
        return views[view](self, metric or self.metric)

    def plot(
        self, ax: Axes | None = None, *, view: View = "differences", metric: str | None = None
    ) -> Axes:
        """Draw the study with matplotlib.

        Args:
            ax: The Axes to draw on; None: those of a new figure.
            view: ``differences``: the paired differences of all positions, with their intervals.
                ``values``: the value of every seed after the last epoch. ``curves``: the metric
                after each epoch of the training, and beside it what the study judges by.
                ``statistics``: what recalibration does to each trained model.
            metric: A name in Keras's history; None: the metric that decides.

        Returns:
            The Axes.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            OptionError: There is no such view, or no trial recorded this metric.
        """
        return plot(self.drawing(view, metric), ax)

    def _other_tests(self) -> Table:
        """The tests beside the t-test, and what more seeds would show, for the deciding metric."""
        asked = self.margin is not None
        return Table(
            f"{self.name}: other tests of the differences in {self.metric}",
            (
                *("difference", "p (sign flips)"),
                *(("90% interval", "p (equivalent)") if asked else ()),
                *("shown in 4 of 5 from", "seeds needed"),
            ),
            tuple(
                (
                    f"{c.first} − {c.second}",
                    number(c.p_flips, 2),
                    *((_ends(c.narrow), number(c.p_equivalent, 2)) if asked else ()),
                    _detectable(self, c),
                    "–" if c.seeds_needed is None else str(c.seeds_needed),
                )
                for c in (possible(self, c) for c in self.comparisons)
                if c.metric == self.metric
            ),
        )


_SHARE = re.compile("(^|_)(acc|accuracy|auc|precision|recall)(_|$)")


def is_share(study: Study, metric: str) -> bool:
    """Whether a metric is a share, such as an accuracy: so called, and from 0 to 1 in this study.

    A training metric is judged by that of validation: the study has no mean of its own of it.
    """
    if not _SHARE.search(metric) or lower_is_better(metric):
        return False
    names = (metric, f"val_{metric}")
    means = [row[name].mean for row in study.summaries.values() for name in names if name in row]
    return all(0 <= mean <= 1 for mean in means if math.isfinite(mean))


def possible(study: Study, comparison: Comparison) -> Comparison:
    """The same, its intervals cut at what a difference of two shares can be: -1 to 1.

    So cut they hold the true difference as often, since it is never in what is cut off. Student's
    interval of two seeds is 13 standard errors wide, and knows nothing of the metric.
    """
    if not is_share(study, comparison.metric):
        return comparison
    narrow = comparison.narrow and _cut(comparison.narrow, -1.0)
    return replace(comparison, difference=_cut(comparison.difference, -1.0), narrow=narrow)


def possible_mean(study: Study, position: str, metric: str) -> Interval:
    """The interval of a position's mean, cut in the same way: a share is between 0 and 1."""
    value = study.summaries[position][metric]
    return _cut(value, 0.0) if is_share(study, metric) else value


def _cut(value: Interval, least: float) -> Interval:
    if value.low is None or value.high is None:
        return value
    return replace(value, low=max(value.low, least), high=min(value.high, 1.0))


def interval(value: Interval) -> str:
    """An interval for a table cell."""
    if value.low is None or value.high is None:
        return f"{value.mean:.4f}"
    return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"


def _detectable(study: Study, comparison: Comparison) -> str:
    """The difference that so many seeds show in four of five studies, if there can be one."""
    least = comparison.detectable
    if least is not None and least > 1 and is_share(study, comparison.metric):
        return "none"
    return number(least, 2)


def _ends(value: Interval | None) -> str:
    return "–" if value is None else f"[{value.low:.4f}, {value.high:.4f}]"
