"""Does a study tell the truth? Its error rates and its power, by simulated studies.

    python benchmarks/study_truth.py [STUDIES] > docs/study_truth.json

Each study draws a value per seed and variant, and judges them as ``truenorm.study`` does: paired
t-tests with Holm's correction, two one-sided tests with Holm's correction. All studies of a cell
are judged at once, with arrays; the first 5 of each cell are judged by ``analyse`` as well, and
must give the same conclusions.

Counted are studies in which anything false was concluded: a difference where there is none, an
equivalence where the true difference is as large as the margin.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import combinations

import numpy as np
from scipy import stats

from truenorm._records.study import Trial
from truenorm._study.analysis import LEVEL, analyse, is_equivalent, is_shown
from truenorm._study.power import planned, power_of_difference, power_of_equivalence

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

NOISE: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed (exponential)": lambda rng, shape: rng.exponential(size=shape),
    "heavy-tailed (t with 3 degrees)": lambda rng, shape: rng.standard_t(3, shape),
    "coarse (5 steps per standard deviation)": lambda rng, s: np.round(5 * rng.normal(size=s)) / 5,
}
SEEDS, VARIANTS = (3, 5, 10, 20), (2, 3, 4, 5, 6)
CHECKED = 5


def conclusions(values: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Which differences are shown and which equivalences: arrays of studies by pairs.

    Args:
        values: Studies, variants, seeds.
        margin: The smallest difference of interest.
    """
    pairs = list(combinations(range(values.shape[1]), 2))
    d = np.stack([values[:, i] - values[:, j] for i, j in pairs], axis=1)
    mean, n = d.mean(axis=-1), d.shape[-1]
    spread = d.std(axis=-1, ddof=1)
    flat = spread <= 1e-9 * np.abs(mean)
    error = np.where(flat, 1.0, spread) / math.sqrt(n)
    differ = 2 * stats.t.sf(np.abs(mean) / error, n - 1)
    differ = np.where(flat, np.where(mean == 0, 1.0, np.nan), differ)
    same = stats.t.sf((margin - np.abs(mean)) / error, n - 1)
    same = np.where(flat, np.nan, same)
    return holm(differ) < LEVEL, holm(same) < LEVEL


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction in each row; a missing p-value counts as the largest."""
    order = np.argsort(np.where(np.isnan(p), 2.0, p), axis=1)
    factors = np.arange(p.shape[1], 0, -1)
    adjusted = np.maximum.accumulate(np.take_along_axis(p, order, axis=1) * factors, axis=1)
    found = np.empty_like(p)
    np.put_along_axis(found, order, np.minimum(adjusted, 1.0), axis=1)
    return found


def agree(values: np.ndarray, margin: float, found: tuple[np.ndarray, np.ndarray]) -> None:
    """The study's own analysis concludes the same."""
    names = [f"v{i}" for i in range(values.shape[1])]
    for one, shown, same in zip(values[:CHECKED], *found, strict=False):
        trials = [
            Trial(name, seed, {"val_score": (v,)}, {"val_score": v}, 1, 1, 1.0, "")
            for name, row in zip(names, one, strict=True)
            for seed, v in enumerate(map(float, row))
        ]
        study = analyse(trials, positions=names, name="", settings={}, margin=margin)
        pairs = [c for c in study.comparisons if c.metric == study.metric]
        assert [is_shown(c) for c in pairs] == shown.tolist()
        assert [is_equivalent(c) for c in pairs] == same.tolist()


def error_rates(studies: int) -> list[dict[str, object]]:
    """Per cell, the share of studies with a false difference, and with a false equivalence."""
    rows: list[dict[str, object]] = []
    for noise, draw in NOISE.items():
        for n in SEEDS:
            for variants in VARIANTS:
                rng = np.random.default_rng([n, variants, len(rows)])
                values = draw(rng, (studies, variants, n))
                margin = 2.0  # any: scaled so that some equivalences are shown
                found = conclusions(values, margin)
                agree(values, margin, found)
                # Now every true difference is the margin or more: no equivalence is true.
                apart = values + margin * np.arange(variants)[:, None]
                unlike = conclusions(apart, margin)
                agree(apart, margin, unlike)
                row = {
                    "noise": noise,
                    "seeds": n,
                    "variants": variants,
                    "false_difference": float(found[0].any(axis=1).mean()),
                    "false_equivalence": float(unlike[1].any(axis=1).mean()),
                }
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
    return rows


def powers(studies: int) -> list[dict[str, object]]:
    """The power that the formulas promise, and the power that studies of that size have."""
    rows: list[dict[str, object]] = []
    for n in SEEDS:
        for effect in (0.5, 1.0, 2.0):
            rng = np.random.default_rng([n, int(10 * effect)])
            values = rng.normal(size=(studies, 2, n)) / math.sqrt(2)  # differences of spread 1
            same = conclusions(values, effect)[1].mean()
            values[:, 0] += effect
            rows.append(
                {
                    "seeds": n,
                    "effect": effect,
                    "difference_promised": power_of_difference(effect, 1.0, n, LEVEL),
                    "difference_found": float(conclusions(values, effect)[0].mean()),
                    "equivalence_promised": power_of_equivalence(effect, 1.0, n, LEVEL),
                    "equivalence_found": float(same),
                }
            )
    return rows


def plans(pilots: int) -> list[dict[str, object]]:
    """What becomes of the advice "a new study needs N seeds", where the margin is one spread."""
    rows: list[dict[str, object]] = []
    for n in SEEDS:
        rng = np.random.default_rng(n)
        spreads = rng.normal(size=(pilots, n)).std(axis=1, ddof=1)
        needed = [planned(0.0, float(s), n, margin=1.0, level=LEVEL) for s in spreads]
        sizes = np.array([1000 if k is None else k for k in needed])
        true = {int(k): power_of_equivalence(1.0, 1.0, int(k), LEVEL) for k in np.unique(sizes)}
        reached = np.array([true[int(k)] for k in sizes])
        rows.append(
            {
                "pilot_seeds": n,
                "advised_median": float(np.median(sizes)),
                "power_mean": float(reached.mean()),
                "share_with_power": float(np.mean(reached >= 0.8)),
            }
        )
    return rows


def main() -> None:
    """Run all three and print one JSON document."""
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    found = {
        "studies_per_cell": studies,
        "errors": error_rates(studies),
        "power": powers(studies),
        "plans": plans(min(studies, 1000)),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
