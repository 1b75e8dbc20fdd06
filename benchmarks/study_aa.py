"""Studies on real training in which nothing differs: how many of 20 end in a claim?

    KERAS_BACKEND=torch python benchmarks/study_aa.py

The same position under two names is the same training bit for bit on a processor, so that no
difference can be seen at all. A harder test gives the second name other initial weights and so
another training, by the same rules: what differs then is chance. 20 studies of 5 seeds each.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import truenorm as tn
from truenorm._study.analysis import is_equivalent, is_shown

STUDIES, SEEDS = 20, 5


def redrawn(model: Any) -> Any:
    """The same model with other initial weights: Keras's generator has moved on."""
    return keras.models.clone_model(model)


def main() -> None:
    """Print each study's conclusion, and the shares."""
    shown = same = 0
    exact = tn.study(
        "mlp:32",
        "wine",
        variants={"one": None, "two": lambda model: model},
        seeds=SEEDS,
        epochs=5,
        batch_size=32,
        runner="here",
    )
    values = [[t.final for t in exact.trials if t.position == p] for p in ("one", "two")]
    assert values[0] == values[1]
    print("the same model under two names: equal bit for bit in every seed")
    for index in range(STUDIES):
        study = tn.study(
            "mlp:32",
            "wine",
            variants={"one": None, "two": redrawn},
            seeds=range(SEEDS * index, SEEDS * (index + 1)),
            epochs=5,
            batch_size=32,
            margin=0.05,
            runner="here",
        )
        (pair,) = (c for c in study.comparisons if c.metric == study.metric)
        shown += is_shown(pair)
        same += is_equivalent(pair)
        p = np.nan if pair.p_value is None else pair.p_value
        print(f"{index}: difference {pair.difference.mean:+.4f}, p = {p:.2f}", flush=True)
    print(f"claims of a difference: {shown} of {STUDIES}; of equivalence within 5 points: {same}")


if __name__ == "__main__":
    main()
