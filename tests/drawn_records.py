"""Studies made by hand, and a name that nobody would choose: for tests of drawings and reports."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from itertools import combinations

import numpy as np

from truenorm._records.study import Comparison, Interval, Study, Trial

HOSTILE = "<img src=x onerror=alert(1)>\n\x1b[31m\u202e'\"&amp; $\\frac$ {{ 1 }} [bold] 漢\ud800]]>"
SHOWN = HOSTILE.replace("\n", "\\x0a").replace("\x1b", "\\x1b").replace("\u202e", "\\x202e")
SHOWN = SHOWN.replace("\ud800", "\\xd800")
POSITIONS = ("before_activation", "after_activation", "none")


def make_study(
    positions: tuple[str, ...] = POSITIONS,
    seeds: int = 5,
    epochs: int = 10,
    name: str = "study",
    recalibrated: float | None = None,
) -> Study:
    """A study as it comes from training: better with every epoch, each position by its own rate.

    With ``recalibrated`` it is judged with statistics that make every position that has some so
    much better.
    """
    rng = np.random.default_rng(0)
    trials: list[Trial] = []
    for k, position in enumerate(positions):
        for seed in range(seeds):
            value = 0.9 - 0.02 * k - 0.4 * np.exp(-np.arange(1, epochs + 1) / (2 + k))
            value += rng.normal(0, 0.004, epochs)
            history = {
                "val_accuracy": tuple(map(float, value)),
                "val_loss": tuple(map(float, 2 - 2 * value)),
            }
            more = 0.0 if recalibrated is None or position == "none" else recalibrated
            final = {
                name: values[-1] + (more if "acc" in name else -more)
                for name, values in history.items()
            }
            file, skew = f"{k}-{seed}.keras", 0.5 if more else None
            trials.append(
                Trial(position, seed, history, final, 4, 1234, 1.5, file, skew_before=skew)
            )
    study = judge(trials, positions, name)
    return replace(study, settings={"recalibrate": recalibrated is not None})


def judge(trials: list[Trial], positions: tuple[str, ...], name: str = "study") -> Study:
    def ends(position: str, metric: str) -> list[float]:
        own = [t.final for t in trials if t.position == position and t.error is None]
        return [final[metric] for final in own if math.isfinite(final[metric])]

    def interval(values: list[float]) -> Interval:
        if len(values) < 2:
            return Interval(values[0] if values else math.nan, None, None, len(values))
        mean = statistics.fmean(values)
        half = 2.776 * statistics.stdev(values) / math.sqrt(len(values))
        return Interval(mean, mean - half, mean + half, len(values))

    metrics = ("val_accuracy", "val_loss")
    pairs = tuple(
        Comparison(
            metric,
            a,
            b,
            interval([x - y for x, y in zip(ends(a, metric), ends(b, metric), strict=False)]),
            0.012,
            0.036,
        )
        for metric in metrics
        for a, b in combinations(positions, 2)
    )
    summaries = {p: {m: interval(ends(p, m)) for m in metrics} for p in positions}
    verdict = (f"{positions[0]} is best.", "It was compared over the same seeds.")
    return Study(name, {}, tuple(trials), summaries, pairs, metrics[0], positions[0], None, verdict)
