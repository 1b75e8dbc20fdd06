"""The study of docs/study.md: positions of BatchNormalization, with ReLU and with tanh.

    export KERAS_BACKEND=torch
    python benchmarks/study_positions.py run FOLDER [TASK…]
    python benchmarks/study_positions.py collect FOLDER > docs/study_positions.json
    python benchmarks/study_positions.py draw docs/study_positions.json docs/study_positions.svg

``run`` goes on where it was stopped. The tasks, seeds, epochs and the margin were fixed in the
commit that brought this file, before any of it was run; each second look (``again``) in a later
commit, before that was run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARGIN = 0.005
ACTIVATIONS = ("relu", "tanh")
POSITIONS = ("none", "before_activation", "after_activation")

# task: model, data, seeds, epochs
TASKS: dict[str, tuple[str, str, int | range, int]] = {
    "dense-breast_cancer": ("mlp:64-64", "breast_cancer", 20, 20),
    "dense-wine": ("mlp:64-64", "wine", 20, 30),
    "conv-digits": ("cnn:16-32", "digits", 5, 8),
    "residual-digits": ("resnet:8-16", "digits", 5, 8),
    # Planned after the four above had been run: new seeds, and the two positions only.
    "conv-digits-again": ("cnn:16-32", "digits", range(5, 25), 8),
    # Planned after that, in the same way.
    "residual-digits-again": ("resnet:8-16", "digits", range(5, 25), 8),
}


def run(folder: Path, tasks: list[str]) -> None:
    """Run the studies, in this process."""
    import truenorm as tn
    from truenorm._study.models import Named

    for task in tasks or TASKS:
        model, data, seeds, epochs = TASKS[task]
        for activation in ACTIVATIONS:
            tn.study(
                Named(model, activation=activation),
                data,
                positions=POSITIONS[1:] if task.endswith("again") else POSITIONS,
                seeds=seeds,
                epochs=epochs,
                batch_size=32,
                margin=MARGIN,
                directory=folder / f"{task}-{activation}",
                name=f"{task}, {activation}",
                runner="here",
                on_event=lambda e: (
                    print(e.kind, e.position, e.seed, e.done, flush=True)
                    if e.kind in ("finished", "failed")
                    else None
                ),
            )


def collect(folder: Path) -> None:
    """Print what the studies found as one JSON document."""
    from truenorm._study.load_and_merge import load

    found: dict[str, Any] = {"margin": MARGIN, "studies": {}}
    for task in TASKS:
        for activation in ACTIVATIONS:
            path = folder / f"{task}-{activation}"
            if not (path / "study.json").exists():
                continue
            study = load(path)
            done = [trial for trial in study.trials if trial.error is None]
            found["versions"] = study.settings["versions"]
            found["studies"][path.name] = {
                "seeds": len(study.settings["seeds"]),
                "epochs": study.settings["epochs"],
                "metric": study.metric,
                "values": {
                    p: [round(t.final[study.metric], 5) for t in done if t.position == p]
                    for p in study.summaries
                },
                "test": {
                    p: [round(t.test["accuracy"], 5) for t in done if t.position == p]
                    for p in study.summaries
                },
                "comparisons": [
                    {
                        "pair": f"{c.first} - {c.second}",
                        "mean": c.difference.mean,
                        "low": c.difference.low,
                        "high": c.difference.high,
                        "p_holm": c.p_adjusted,
                        "p_flips": c.p_flips,
                        "p_equivalent": c.p_equivalent,
                        "seeds_needed": c.seeds_needed,
                    }
                    for c in study.comparisons
                    if c.metric == study.metric
                ],
                "winner": study.winner,
                "verdict": list(study.verdict),
            }
    print(json.dumps(found, indent=1))


def draw(results: Path, picture: Path) -> None:
    """One row per study: after minus before, its 95% interval, and the margin."""
    from matplotlib.figure import Figure

    found = json.loads(results.read_text("utf-8"))
    rows = [
        (name, pair)
        for name, study in found["studies"].items()
        for pair in study["comparisons"]
        if pair["pair"] == "before_activation - after_activation"
    ]
    figure = Figure((8, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(-100 * found["margin"], 100 * found["margin"], color="#e6e9ed")
    axes.axvline(0, color="#58616d", lw=1)
    for y, (_, pair) in enumerate(rows):
        # The record has before minus after; the claims are about after minus before.
        low, mean, high = (-100 * pair[key] for key in ("high", "mean", "low"))
        shown = pair["p_holm"] is not None and pair["p_holm"] < 0.05
        axes.plot([low, high], [y, y], color="#1b2027", lw=2)
        axes.plot(mean, y, "o", color="#1b2027", mfc="#1b2027" if shown else "white", ms=8)
    axes.set_yticks(range(len(rows)), [name.replace("-", ", ") for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("after minus before: points of validation accuracy, 95% interval")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "run":
        run(Path(arguments[0]), arguments[1:])
    elif command == "collect":
        collect(Path(arguments[0]))
    else:
        draw(Path(arguments[0]), Path(arguments[1]))
