"""From trials to a verdict, against independent computations."""

import math
import re
from collections.abc import Sequence
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from truenorm._errors import StudyError
from truenorm._records.study import Study, Trial, lower_is_better
from truenorm._study.analysis import analyse, holm, student

pytestmark = pytest.mark.any_backend

Rows = list[tuple[float, ...]]
A, B, N = "after_activation", "before_activation", "none"
T_975_4 = 2.7764451052  # the table's 0.975 quantile of Student's t with 4 degrees of freedom


def trial(position: str, seed: int, error: str | None = None, **last: float) -> Trial:
    history = {} if error else dict.fromkeys(last, (0.0, 7.0))
    final = {} if error else {n: value for n, value in last.items() if n.startswith("val_")}
    return Trial(position, seed, history, final, 1, 10, 1.0, "", error)


def trials_of(metric: str = "val_accuracy", **values: Sequence[float]) -> list[Trial]:
    return [
        trial(position, seed, **{"loss": 1.0, metric: value, "val_loss": 1 - value})
        for position, row in values.items()
        for seed, value in enumerate(row)
    ]


def judged(trials: list[Trial], positions: Sequence[str], notes: Sequence[str] = ()) -> Study:
    return analyse(trials, positions=positions, name="s", settings={}, notes=notes)


def holm_by_hand(p_values: list[float]) -> list[float]:
    """The step-down procedure in its original form: reject while p <= level / (m - k)."""
    adjusted = []
    for own in p_values:
        smaller = sorted(p for p in p_values if p <= own)
        adjusted.append(min(1, max((len(p_values) - k) * p for k, p in enumerate(smaller))))
    return adjusted


def test_interval_by_the_table() -> None:
    value, _ = student(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = T_975_4 * math.sqrt(2.5) / math.sqrt(5)
    assert (value.mean, value.n) == (3.0, 5)
    assert value.low == pytest.approx(3 - half)
    assert value.high == pytest.approx(3 + half)


@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_comparisons_are_scipys_paired_test_with_holm(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    values = {p: rng.normal(0.8 + 0.05 * i, 0.05, n) for i, p in enumerate((N, B, A))}
    study = judged(trials_of(**values), (N, B, A))
    mine = [c for c in study.comparisons if c.metric == "val_accuracy"]
    theirs = [stats.ttest_rel(values[a], values[b]) for a, b in combinations((N, B, A), 2)]
    assert [(c.first, c.second) for c in mine] == [(N, B), (N, A), (B, A)]
    for comparison, expected in zip(mine, theirs, strict=True):
        interval = expected.confidence_interval(0.95)
        assert comparison.p_value == pytest.approx(expected.pvalue)
        assert comparison.difference.low == pytest.approx(interval.low)
        assert comparison.difference.high == pytest.approx(interval.high)
    by_hand = holm_by_hand([t.pvalue for t in theirs])
    assert [c.p_adjusted for c in mine] == pytest.approx(by_hand)
    for position, row in values.items():
        low, high = stats.t.interval(0.95, n - 1, np.mean(row), stats.sem(row))
        summary = study.summaries[position]["val_accuracy"]
        assert (summary.low, summary.high) == pytest.approx((low, high))


def test_holm_on_a_textbook_case() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02, None, 0.5]) == pytest.approx([0.06, None, 1.0])
    assert holm([]) == []


# Multiples of 1/64: their differences are exact, so that a shift changes no rounding.
grid = st.integers(0, 64).map(lambda k: k / 64)


@given(st.lists(st.tuples(grid, grid, grid), min_size=1, max_size=6), st.randoms())
@settings(max_examples=50, deadline=None)
def test_order_of_trials_does_not_matter(rows: Rows, random: Random) -> None:
    columns = dict(zip((N, B, A), zip(*rows, strict=True), strict=True))
    trials = trials_of(**columns)
    shuffled = trials.copy()
    random.shuffle(shuffled)
    assert judged(shuffled, (N, B, A)) == judged(trials, (N, B, A))


@given(st.lists(st.tuples(grid, grid), min_size=1, max_size=6), st.integers(-8, 8))
@settings(max_examples=50, deadline=None)
def test_a_shift_of_the_metric_leaves_the_differences(rows: Rows, shift: int) -> None:
    before, after = zip(*rows, strict=True)
    plain = judged(trials_of(**{B: before, A: after}), (B, A))
    moved = {B: [v + shift for v in before], A: [v + shift for v in after]}
    shifted = judged(trials_of(**moved), (B, A))
    assert shifted.comparisons[0] == plain.comparisons[0]
    assert shifted.winner == plain.winner


@given(st.lists(st.tuples(grid, grid, grid), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_winner_is_shown_against_every_other(rows: Rows) -> None:
    columns = dict(zip((N, B, A), zip(*rows, strict=True), strict=True))
    study = judged(trials_of(**columns), (N, B, A))
    own = [c for c in study.comparisons if c.metric == study.metric]
    own = [c for c in own if study.best in (c.first, c.second)]
    shown = all(c.p_adjusted is not None and c.p_adjusted < 0.05 for c in own)
    assert study.winner == (study.best if shown else None)
    assert study.best == max((N, B, A), key=lambda p: np.mean(columns[p]))


def test_verdict_with_a_winner() -> None:
    after = [0.94, 0.95, 0.945, 0.955, 0.95]
    before = [v - d for v, d in zip(after, (0.012, 0.010, 0.014, 0.011, 0.013), strict=True)]
    study = judged(trials_of(**{B: before, A: after}), (B, A), notes=("A note.",))
    assert (study.best, study.winner) == (A, A)
    assert study.verdict == (
        "after_activation is best: its validation accuracy (94.80%, 5 seeds) is 1.20 points "
        "[1.00, 1.40] above before_activation's, shown at the 5% level (in brackets: 95% "
        "intervals).",
        "The exact sign-flip test, which does not assume normal noise, gives for before_activation "
        "and after_activation p = 0.062 (with 5 seeds it cannot be below 0.062).",
        "A note.",
    )
    assert "before_activation − after_activation" in str(study)


def test_verdict_without_a_difference() -> None:
    study = judged(trials_of(**{B: [0.9, 0.92, 0.91], A: [0.91, 0.915, 0.9]}), (B, A))
    assert study.winner is None
    assert study.verdict == (
        "before_activation has the best mean validation accuracy (91.00%, 3 seeds), but it is not "
        "shown to differ from every other position.",
        "No difference shown between before_activation and after_activation in validation "
        "accuracy: before_activation minus after_activation is 0.17 points [-2.42, 2.75]; with 3 "
        "seeds a true difference must be 3.40 points or more to be shown in 4 of 5 studies; to "
        "show a difference as large as this one, a new study needs more than 1,000 seeds.",
    )


def test_lower_is_better_for_losses_and_errors() -> None:
    rows = {B: [0.5, 0.52, 0.51, 0.5], A: [0.4, 0.43, 0.41, 0.39]}
    trials = [trial(p, s, val_loss=v) for p, row in rows.items() for s, v in enumerate(row)]
    study = judged(trials, (B, A))
    assert (study.metric, study.best, study.winner) == ("val_loss", A, A)
    assert "is 0.1 [" in study.verdict[0]
    assert "below before_activation's" in study.verdict[0]
    assert lower_is_better("val_mae")
    assert lower_is_better("val_mean_squared_error")
    assert not lower_is_better("val_accuracy")
    assert not lower_is_better("val_auc")


def test_an_interval_without_zero_that_holm_does_not_confirm_says_so() -> None:
    after = [0.90, 0.91, 0.92, 0.905]
    before = [v - d for v, d in zip(after, (0.010, 0.012, 0.008, 0.020), strict=True)]
    none = [v - d for v, d in zip(after, (0.010, -0.020, 0.025, 0.010), strict=True)]
    study = judged(trials_of(**{N: none, B: before, A: after}), (N, B, A))
    pair = study.comparisons[2]
    assert pair.difference.high is not None
    assert pair.difference.high < 0 or pair.difference.low > 0
    assert study.winner is None
    assert (
        f"(p = {pair.p_value:.2g} alone, {pair.p_adjusted:.2g} after Holm's correction for 3 "
        "comparisons)"
    ) in study.verdict[3]


def test_one_seed() -> None:
    study = judged(trials_of(**{B: [0.9], A: [0.8]}), (B, A))
    comparison = study.comparisons[0]
    assert (comparison.difference.low, comparison.p_value, comparison.p_adjusted) == (None,) * 3
    assert study.summaries[B]["val_accuracy"].low is None
    assert (study.best, study.winner) == (B, None)
    assert study.verdict == (
        "before_activation has the best validation accuracy (90.00%), but with 1 seed nothing can "
        "be told from chance: run the study with at least 2 seeds, better 5 or more.",
    )


def test_an_interval_ends_where_the_metric_does() -> None:
    """Student's of two seeds go far beyond what an accuracy can be; the record keeps them."""
    study = judged(trials_of(**{B: [0.90, 0.98], A: [0.99, 0.90]}), (B, A))
    raw = study.comparisons[0].difference
    assert (raw.low, raw.high) == pytest.approx((-0.005 - 1.08005, -0.005 + 1.08005), abs=1e-4)
    means, pairs, others = study.tables()[:3]
    assert [row[2] for row in means.rows] == [
        "0.9400 [0.4318, 1.0000]", "0.9450 [0.3732, 1.0000]"
    ]  # fmt: skip
    assert pairs.rows[0][2] == "-0.0050 [-1.0000, 1.0000]"
    assert means.rows[0][3].startswith("0.0600 [-0.4482,")  # a loss may be anything
    assert others.rows[0][2] == "none"
    assert "[-100.00, 100.00]" in " ".join(study.verdict)
    loss = judged(trials_of("val_mae", **{B: [0.90, 0.98], A: [0.99, 0.90]}), (B, A))
    assert loss.tables()[1].rows[0][2] == "-0.0050 [-1.0850, 1.0750]"


def test_an_accuracy_in_percent_is_not_cut() -> None:
    """Student's of the differences -0.5, -1.5 and 2: 4.3027 times 1.8028 / sqrt(3)."""
    metric, rows = "val_accuracy_percent", {B: [60.0, 70.0, 65.0], A: [60.5, 71.5, 63.0]}
    study = judged(trials_of(metric, **rows), (B, A))
    means, pairs, others = study.tables()[:3]
    assert means.rows[0][2].startswith("65.0000 [52.5")
    assert pairs.rows[0][2] == "0.0000 [-4.4783, 4.4783]"
    assert others.rows[0][2] != "none"
    told = " ".join(study.verdict)
    assert " 0 [-4.48, 4.48]; with 3 seeds a true difference must be " in told
    assert "%" not in told
    assert study.drawing("values").unit == metric  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("metric", "share"),
    [
        *((f"val_{name}", True) for name in ("acc", "sparse_categorical_accuracy", "auc_1")),
        *((f"val_{name}", True) for name in ("precision", "head_recall")),
        *((f"val_{name}", False) for name in ("acceleration_mae", "distance_accumulated")),
        ("val_accuracy_error", False),
    ],
)
def test_a_share_is_known_by_whole_words(metric: str, share: bool) -> None:
    study = judged(trials_of(metric, **{B: [0.90, 0.98], A: [0.99, 0.90]}), (B, A))
    expected = "[-1.0000, 1.0000]" if share else "[-1.0850, 1.0750]"
    assert study.tables()[1].rows[0][2] == f"-0.0050 {expected}"
    assert ("[-100.00, 100.00]" in " ".join(study.verdict)) is share
    assert (study.drawing("values").unit == metric) is not share  # type: ignore[attr-defined]


def test_equal_differences_are_not_taken_for_proof() -> None:
    study = judged(trials_of(**{B: [0.9, 0.8, 0.7], A: [0.8, 0.7, 0.6]}), (B, A))
    assert study.comparisons[0].p_value is None
    assert study.winner is None
    assert "10.00 points [10.00, 10.00] higher in each of 3 seeds" in study.verdict[1]


def test_equal_values_have_p_one() -> None:
    study = judged(trials_of(**{B: [0.9, 0.8], A: [0.9, 0.8]}), (B, A))
    assert study.comparisons[0].p_value == 1.0
    assert study.verdict[1] == (
        "before_activation and after_activation gave the same validation accuracy in every seed."
    )


def test_a_diverged_trial_is_left_out_of_the_means_and_cannot_win() -> None:
    rows = {B: [0.6, 0.61, 0.62], A: [0.2, 0.21, math.nan]}
    trials = [trial(p, s, val_loss=v) for p, row in rows.items() for s, v in enumerate(row)]
    study = judged(trials, (B, A))
    assert study.summaries[A]["val_loss"].mean == pytest.approx(0.205)
    assert study.comparisons[0].difference.n == 2
    assert study.best == B
    assert study.verdict[-1] == (
        "after_activation diverged (a metric that is not a number) with seed 2; such values are "
        "left out of the means, which flatters this position."
    )
    assert study.to_json()


@pytest.mark.parametrize("metric", ["val_accuracy", "val_error"])
def test_who_is_shown_to_be_worse_is_no_winner(metric: str) -> None:
    """The other one diverged once, and is far better in every seed that both have."""
    sign = -1 if lower_is_better(metric) else 1
    steady, better = [0.8, 0.801, 0.802, 0.803], [math.nan, 0.9011, 0.9023, 0.9034]
    rows = {B: steady, A: better}
    study = judged(
        trials_of(metric, **{p: [sign * v for v in row] for p, row in rows.items()}), (B, A)
    )
    assert study.comparisons[0].p_adjusted is not None
    assert study.comparisons[0].p_adjusted < 1e-4
    assert (study.best, study.winner) == (B, None)
    assert " has the best mean validation " in study.verdict[0]
    assert " of those that diverged least (" in study.verdict[0]
    assert study.verdict[0].endswith("not shown to be better than every other position.")
    assert study.verdict[1].startswith("after_activation is shown to be better than before_")


def test_means_over_other_seeds_make_no_winner() -> None:
    """Both lack one seed: over those that both have the one with the lower mean is better."""
    rows = {B: [0.9, 0.5, 0.501, 0.503, math.nan], A: [math.nan, 0.6, 0.6012, 0.6031, 0.4]}
    assert judged(trials_of(**rows), (B, A)).winner is None


def test_every_trial_diverged() -> None:
    trials = [trial(p, s, val_loss=math.nan) for p in (B, A) for s in (0, 1)]
    study = judged(trials, (B, A))
    assert study.winner is None
    assert study.verdict[0] == (
        "No position has a validation loss that is a number: every run diverged."
    )


def test_a_failed_trial_takes_its_seed_out_everywhere() -> None:
    trials = trials_of(**{B: [0.9, 0.91, 0.5], A: [0.95, 0.94]})
    trials.append(trial(A, 2, error="the worker was ended by signal 9\nsome more"))
    study = judged(trials, (B, A))
    assert study.summaries[B]["val_accuracy"].mean == pytest.approx(0.905)
    assert len(study.trials) == 6
    assert study.verdict[-1] == (
        "Seed 2 is left out at every position: its trial of after_activation failed (the worker "
        "was ended by signal 9)."
    )


def test_a_trial_reported_twice_counts_once() -> None:
    trials = trials_of(**{B: [0.9, 0.91], A: [0.95, 0.97]})
    failed_before = trial(A, 1, error="killed")
    assert judged([failed_before, *trials, trials[0], trials[3]], (B, A)) == judged(trials, (B, A))


def test_a_position_without_a_finished_trial() -> None:
    trials = [trial(B, 0, val_loss=1.0), trial(A, 0, error="no memory"), trial(A, 1, error="other")]
    message = (
        "No trial of after_activation finished (at 'after_activation, seed 0'). Expected: at least "
        "one seed that finishes at every position. Received: 2 failed; the first: no memory. "
        "Remedy: mend the cause and run the study again: finished trials are kept."
    )
    with pytest.raises(StudyError, match=f"^{re.escape(message)}$"):
        judged(trials, (B, A))


def test_no_seed_in_common() -> None:
    trials = [trial(B, 0, val_loss=1.0), trial(A, 0, error="x"), trial(B, 1, error="y")]
    trials.append(trial(A, 1, val_loss=1.0))
    with pytest.raises(
        StudyError, match=r"^No seed finished at every position, so there is nothing to compare"
    ):
        judged(trials, (B, A))
