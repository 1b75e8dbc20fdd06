"""Every kind of verdict, word by word, from the record alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_analysis import A, B, N, trial, trials_of

from truenorm._records.study import Study, Trial
from truenorm._study.analysis import analyse, verdict

pytestmark = pytest.mark.any_backend

AFTER = [0.94, 0.95, 0.945, 0.955, 0.95, 0.947, 0.952]
WORSE = [
    v - d for v, d in zip(AFTER, (12e-3, 10e-3, 14e-3, 11e-3, 13e-3, 12e-3, 11e-3), strict=True)
]
NEAR = [v - d for v, d in zip(AFTER, (1e-3, -1e-3, 0, 5e-4, -5e-4, 1e-3, -15e-4), strict=True)]
FLIPS = "The exact sign-flip test, which does not assume normal noise, gives for "
FIRST = (
    "before_activation has the best mean validation accuracy (94.85%, 7 seeds), but it is not "
    "shown to differ from every other position."
)

KINDS: dict[str, tuple[list[Trial], tuple[str, ...], float | None, tuple[str, ...]]] = {
    "a winner by less than the margin": (
        trials_of(**{B: WORSE, A: AFTER}),
        (B, A),
        0.02,
        (
            "after_activation is best: its validation accuracy (94.84%, 7 seeds) is 1.19 points "
            "[1.06, 1.31] above before_activation's, shown at the 5% level (in brackets: 95% "
            "intervals). The difference to before_activation is shown to be smaller than 2.00 "
            "points, the smallest of interest.",
            f"{FLIPS}before_activation and after_activation p = 0.016.",
        ),
    ),
    "equivalent": (
        trials_of(**{B: NEAR, A: AFTER}),
        (B, A),
        0.005,
        (
            FIRST,
            "before_activation and after_activation are equivalent within 0.50 points in "
            "validation accuracy: before_activation minus after_activation is 0.01 points [-0.06, "
            "0.08] (90% interval; p = 5.4e-06 that it is larger; 7 seeds).",
        ),
    ),
    "not decided, with a margin": (
        trials_of(**{B: [0.9, 0.92, 0.91], A: [0.91, 0.915, 0.9]}),
        (B, A),
        0.005,
        (
            "before_activation has the best mean validation accuracy (91.00%, 3 seeds), but it is "
            "not shown to differ from every other position.",
            "Not decided between before_activation and after_activation in validation accuracy: "
            "neither a difference nor one smaller than 0.50 points is shown: before_activation "
            "minus after_activation is 0.17 points [-2.42, 2.75]; with 3 seeds a true difference "
            "must be 3.40 points or more to be shown in 4 of 5 studies; to decide, a new study "
            "needs about 168 seeds (165 more).",
        ),
    ),
    "no difference shown, without a margin": (
        trials_of(**{B: [0.9, 0.92, 0.91, 0.9], A: [0.92, 0.925, 0.9, 0.92]}),
        (B, A),
        None,
        (
            "after_activation has the best mean validation accuracy (91.62%, 4 seeds), but it is "
            "not shown to differ from every other position.",
            "No difference shown between after_activation and before_activation in validation "
            "accuracy: after_activation minus before_activation is 0.88 points [-1.41, 3.16]; with "
            "4 seeds a true difference must be 3.06 points or more to be shown in 4 of 5 studies; "
            "to show a difference as large as this one, a new study needs about 66 seeds (62 "
            "more).",
        ),
    ),
    "no difference of shares is as large as needed": (
        trials_of(**{B: [0.2, 0.9, 0.4], A: [0.9, 0.3, 0.2]}),
        (B, A),
        None,
        (
            "before_activation has the best mean validation accuracy (50.00%, 3 seeds), but it is "
            "not shown to differ from every other position.",
            "No difference shown between before_activation and after_activation in validation "
            "accuracy: before_activation minus after_activation is 3.33 points [-100.00, 100.00]; "
            "with 3 seeds no difference is large enough to be shown in 4 of 5 studies; to show a "
            "difference as large as this one, a new study needs more than 1,000 seeds.",
        ),
    ),
    "differences beside an equivalence": (
        trials_of(**{N: WORSE, B: NEAR, A: AFTER}),
        (N, B, A),
        0.005,
        (
            FIRST,
            "before_activation is shown to be better than the model without BatchNormalization: "
            "its validation accuracy is 1.19 points [1.06, 1.32] higher.",
            "after_activation is shown to be better than the model without BatchNormalization: its "
            "validation accuracy is 1.19 points [1.06, 1.31] higher.",
            "before_activation and after_activation are equivalent within 0.50 points in "
            "validation accuracy: before_activation minus after_activation is 0.01 points [-0.06, "
            "0.08] (90% interval; p = 1.6e-05 that it is larger after Holm's correction for 3 "
            "comparisons; 7 seeds).",
            f"{FLIPS}the model without BatchNormalization and before_activation p = 0.016, the "
            "model without BatchNormalization and after_activation p = 0.016.",
        ),
    ),
    "no BatchNormalization is best": (
        trials_of(**{N: AFTER, B: WORSE}),
        (N, B),
        None,
        (
            "The model without BatchNormalization is best: its validation accuracy (94.84%, 7 "
            "seeds) is 1.19 points [1.06, 1.31] above before_activation's, shown at the 5% level "
            "(in brackets: 95% intervals).",
            f"{FLIPS}the model without BatchNormalization and before_activation p = 0.016.",
        ),
    ),
    "a winner over no BatchNormalization": (
        trials_of(**{N: WORSE, B: AFTER}),
        (N, B),
        None,
        (
            "before_activation is best: its validation accuracy (94.84%, 7 seeds) is 1.19 points "
            "[1.06, 1.31] above that of the model without BatchNormalization, shown at the 5% "
            "level (in brackets: 95% intervals).",
            f"{FLIPS}the model without BatchNormalization and before_activation p = 0.016.",
        ),
    ),
    "a variant that its user calls none": (
        trials_of(**{N: [0.9, 0.8], "ghost": [0.9, 0.8]}),
        (N, "ghost"),
        None,
        (
            "none has the best mean validation accuracy (85.00%, 2 seeds), but it is not shown to "
            "differ from every other variant.",
            "none and ghost gave the same validation accuracy in every seed.",
        ),
    ),
    "the same difference in every seed": (
        trials_of(**{B: [0.5, 0.5], A: [1.0, 1.0]}),
        (B, A),
        None,
        (
            "after_activation has the best mean validation accuracy (100.00%, 2 seeds), but it is "
            "not shown to differ from every other position.",
            "No difference shown between after_activation and before_activation: the validation "
            "accuracy of after_activation is 50.00 points [50.00, 50.00] higher in each of 2 "
            "seeds, which leaves no spread to test against; use more seeds or more validation "
            "data.",
        ),
    ),
    "a variant that never finished": (
        [
            *trials_of(**{B: WORSE, A: AFTER}),
            trial("large", 0, error="out of memory\nat step 3"),
            trial("large", 1, error="out of memory"),
        ],
        (B, A, "large"),
        None,
        (
            "after_activation is best: its validation accuracy (94.84%, 7 seeds) is 1.19 points "
            "[1.06, 1.31] above before_activation's, shown at the 5% level (in brackets: 95% "
            "intervals).",
            f"{FLIPS}before_activation and after_activation p = 0.016.",
            "large is not compared: none of its trials finished (out of memory).",
        ),
    ),
    "a metric that is too coarse for the margin": (
        trials_of(**{B: [0.9] * 5, A: [0.9, 0.9, 0.9, 0.9, 0.91]}),
        (B, A),
        0.005,
        (
            "after_activation has the best mean validation accuracy (90.20%, 5 seeds), but it is "
            "not shown to differ from every other position.",
            "Not decided between after_activation and before_activation in validation accuracy: "
            "after_activation minus before_activation is 0.20 points [-0.36, 0.76], but most seeds "
            "gave both the same value, so that the metric is too coarse to show a difference "
            "smaller than 0.50 points; use more validation data.",
        ),
    ),
    "variants, not positions": (
        trials_of(stock=[0.9, 0.8], ghost=[0.9, 0.8]),
        ("stock", "ghost"),
        0.01,
        (
            "stock has the best mean validation accuracy (85.00%, 2 seeds), but it is not shown to "
            "differ from every other variant.",
            "stock and ghost gave the same validation accuracy in every seed.",
        ),
    ),
}


def judged(kind: str) -> Study:
    trials, variants, margin, _ = KINDS[kind]
    return analyse(trials, positions=variants, name="s", settings={}, margin=margin)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sentences(kind: str) -> None:
    assert judged(kind).verdict == KINDS[kind][3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_alone_decides_the_sentences(kind: str) -> None:
    study = judged(kind)
    assert verdict(replace(study, name="other", verdict=())) == KINDS[kind][3]
