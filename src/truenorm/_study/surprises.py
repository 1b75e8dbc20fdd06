"""Signs in the trials that the experiment was not fair."""

from __future__ import annotations

from collections.abc import Sequence

from truenorm._records.study import Trial


def surprises(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Sentences for the verdict: trials that started or trained differently where they must not."""
    done = [trial for trial in trials if trial.error is None]
    return (*_starts(done), *_sizes(done), *_stopped(done))


def _starts(trials: Sequence[Trial]) -> list[str]:
    """Variants of a seed that did not start from the same weights."""
    starts: dict[int, set[str]] = {}
    for trial in trials:
        starts.setdefault(trial.seed, set()).add(trial.start)
    seeds = sorted(seed for seed, found in starts.items() if len(found) > 1)
    if not seeds:
        return []
    return [
        f"Caution: with seed {', '.join(map(str, seeds))} build did not give the same weights to "
        "every variant, so that they differ in more than what is compared: build must draw its "
        "weights from Keras's initializers alone."
    ]


def _sizes(trials: Sequence[Trial]) -> list[str]:
    """A variant whose training had other numbers of steps with other seeds."""
    steps: dict[str, set[int]] = {}
    for trial in trials:
        if not trial.stopped:
            steps.setdefault(trial.position, set()).add(trial.steps)
    unlike = [f"{min(n)} to {max(n)} in {name}" for name, n in steps.items() if len(n) > 1]
    if not unlike:
        return []
    return [
        "Caution: the training data is not of the same length with every seed (steps of a trial: "
        f"{'; '.join(unlike)}), so that the spread between seeds is also one of lengths."
    ]


def _stopped(trials: Sequence[Trial]) -> list[str]:
    stopped = [trial for trial in trials if trial.stopped]
    if not stopped:
        return []
    return [
        f"{len(stopped)} of {len(trials)} trainings were ended early by a callback; the last epoch "
        "that each had is what counts."
    ]
