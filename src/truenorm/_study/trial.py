"""One training run of a study, in whichever process.

All variants of a seed start from the same weights and see the same batches in the same order; only
what the variant changes differs.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from truenorm._errors import DataError, ModelError
from truenorm._keras_internals import leave_tensorflow_unloaded
from truenorm._model.values import numbers
from truenorm._records.files import replacing
from truenorm._records.recalibration import Recalibration
from truenorm._records.study import Trial
from truenorm._statistics.recalibrate import recalibrate
from truenorm._study.datasets import Parts
from truenorm._study.folder import Spec, read_data, write_result
from truenorm._study.measure import Clock, Costs, costs, largest, peak_memory, sites
from truenorm._study.models import made
from truenorm._study.plan import Plan, read_plan
from truenorm._study.seeded import seeded
from truenorm._study.worker_output import say

_STARTED = time.perf_counter()

Tell = Callable[[int, dict[str, float]], None]
"""Is told every epoch's number and metrics."""


class Batches(keras.utils.PyDataset):
    """The batches of an epoch, decided by seed and epoch alone.

    The order is NumPy's, so it is the same on every backend. In training the rest that does not
    fill a batch is left out (other samples each epoch): a small last batch has poor statistics,
    and a batch of one has none.

    Args:
        x: Inputs, samples first.
        y: Targets.
        batch_size: Samples per batch.
        seed: Decides the order, together with :attr:`epoch`; None keeps the order and the rest.
    """

    def __init__(self, x: Any, y: np.ndarray, batch_size: int, seed: int | None) -> None:
        super().__init__()
        self._x, self._y, self._seed = x, y, seed
        self._size = min(batch_size, len(x))
        self._order = np.arange(len(x))
        self.start(0)

    def start(self, epoch: int) -> None:
        """Set the order of this epoch.

        Called with fit's own epoch number: ``on_epoch_end`` is also called before the first epoch.
        """
        if self._seed is not None:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._x))

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self._x), self._size)
        return whole + (rest > 0 and self._seed is None)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._order[index * self._size : (index + 1) * self._size]
        return self._x[chosen], self._y[chosen]


class _Epochs(keras.callbacks.Callback):
    """Sets the order of the batches before each epoch, and reports its metrics after it."""

    def __init__(self, batches: Any, tell: Tell) -> None:
        super().__init__()
        self._batches, self._tell = batches, tell

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        if isinstance(self._batches, Batches):
            self._batches.start(epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._tell(epoch + 1, {name: float(value) for name, value in (logs or {}).items()})


@dataclass
class Training:
    """One trial: its plan and spec, the data of its seed, and the model of its variant."""

    plan: Plan
    spec: Spec
    arrays: Parts | None
    start: str = ""

    @property
    def batch_size(self) -> int:
        """The variant's batch size, or the study's."""
        return self.plan.variants[self.spec.position].batch_size or self.spec.batch_size

    def data(self) -> Parts:
        """The data of this seed, made anew: some can be gone through only once."""
        seed = self.spec.seed
        return seeded(seed, lambda: self.plan.parts(self.arrays, seed, self.batch_size))

    def model(self) -> Any:
        """The compiled model of this trial, before its first step."""
        keras.config.set_floatx(self.spec.floatx)
        keras.config.set_dtype_policy(self.spec.dtype_policy)
        base = made(self.plan.build, self.data, self.spec.seed)
        if not isinstance(base, keras.Model) or not base.compiled:
            raise ModelError(
                "The function did not build a compiled model",
                where="build",
                expected="a compiled keras.Model",
                received=type(base).__name__,
            )
        self.start = weights_digest(base)
        return self.plan.variants[self.spec.position].applied(base)

    def fit(self, model: Any, tell: Tell) -> tuple[dict[str, tuple[float, ...]], Clock]:
        """Fit the model; Keras's history comes back, and the times of the steps."""
        parts = self.data()
        train = batches(parts.train, self.batch_size, self.spec.seed)
        clock = Clock()
        own = [] if self.plan.callbacks is None else list(self.plan.callbacks())
        # Again, since making model and data may have drawn numbers, and torch's dropout draws from
        # the global generator whatever seed its layer has.
        keras.utils.set_random_seed(self.spec.seed)
        history = model.fit(
            train,
            validation_data=batches(parts.validation, self.batch_size, None),
            epochs=self.spec.epochs,
            steps_per_epoch=parts.steps_per_epoch,
            validation_steps=parts.validation_steps,
            shuffle=False,
            verbose=0,
            callbacks=[_Epochs(train, tell), clock, *own],
        ).history
        return {name: tuple(float(v) for v in values) for name, values in history.items()}, clock

    def recalibrated(self, model: Any) -> Recalibration | None:
        """Recalibrate the model, if the study wants that and the model has BatchNormalization."""
        if not self.spec.recalibrate or not sites(model):
            return None
        parts = self.data()
        once = isinstance(parts.train, Iterator)
        return recalibrate(
            model,
            parts.train,
            # "population" reads the data more than once, which a stream does not allow.
            upstream="batch" if once or parts.steps_per_epoch else "population",
            batch_size=self.batch_size,
            progress=False,
            **({"max_batches": parts.steps_per_epoch} if parts.steps_per_epoch else {}),
        )

    def judge(self, model: Any) -> tuple[dict[str, float], dict[str, float]]:
        """The metrics on the validation part and on the test part."""
        parts = self.data()

        def metrics(data: Any, steps: int | None) -> dict[str, float]:
            found = model.evaluate(
                batches(data, self.batch_size, None), steps=steps, verbose=0, return_dict=True
            )
            return {name: float(value) for name, value in found.items()}

        validation = metrics(parts.validation, parts.validation_steps)
        test = {} if parts.test is None else metrics(parts.test, parts.test_steps)
        return {f"val_{name}": value for name, value in validation.items()}, test

    def costs(self, model: Any) -> Costs:
        """What inference costs, on one batch of the validation part."""
        for batch in _first(batches(self.data().validation, self.batch_size, None)):
            return costs(model, batch[0])
        return Costs()


def batches(data: Any, batch_size: int, seed: int | None) -> Any:
    """Arrays as batches whose order the seed decides; anything else is batches already."""
    if isinstance(data, tuple):
        x, y = cast(tuple[Any, Any], data)
        return Batches(x, y, batch_size, seed)
    return data


def _first(data: Any) -> Iterator[Any]:
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        yield data[0]
    else:
        yield next(iter(data))


def run(training: Training, tell: Tell, save: Callable[[Any], str]) -> Trial:
    """Train, judge and measure; the model is saved as it was trained.

    Args:
        training: The trial.
        tell: Told of every epoch.
        save: Saves the model and gives the name of its file.

    Raises:
        DataError: The training data is empty.
    """
    spec = training.spec
    model = training.model()
    history, clock = training.fit(model, tell)
    if not clock.steps or not history:
        raise DataError("There is no batch in the training data", where=f"seed {spec.seed}")
    kept = save(model) if spec.keep_model else ""
    done = training.recalibrated(model) if _finite(history) else None
    final, test = training.judge(model)
    measured = training.costs(model) if spec.costs else Costs()
    return Trial(
        position=spec.position,
        seed=spec.seed,
        history=history,
        final=final,
        sites=sites(model),
        parameters=int(model.count_params()),
        seconds=time.perf_counter() - _STARTED,
        model=kept,
        stopped=len(next(iter(history.values()))) < spec.epochs,
        steps=clock.steps,
        step_seconds=clock.median,
        memory=peak_memory(),
        skew_before=None if done is None else largest(done.before),
        skew_after=None if done is None else largest(done.after),
        foldable=measured.foldable,
        left=measured.left,
        predict_seconds=measured.predict,
        predict_folded_seconds=measured.folded,
        test=test,
        start=training.start,
    )


def weights_digest(model: Any) -> str:
    """A hash of all weights, whatever the layers are called."""
    made_ = hashlib.sha256()
    for weight in model.weights:
        made_.update(np.ascontiguousarray(numbers(weight)).tobytes())
    return made_.hexdigest()[:16]


def _finite(history: dict[str, tuple[float, ...]]) -> bool:
    """Whether the last loss is a number; statistics of a model that diverged cannot be taken."""
    return all(math.isfinite(values[-1]) for name, values in history.items() if "loss" in name)


def main(path: Path) -> None:
    """Run the trial of this spec and write its result, in a process of its own."""
    leave_tensorflow_unloaded()
    spec, folder = Spec.read(path), path.parent.parent

    def save(model: Any) -> str:
        with replacing(folder / spec.file(".keras")) as temporary:
            model.save(temporary)
        return spec.file(".keras")

    training = Training(read_plan(folder), spec, read_data(folder))
    write_result(folder, spec, run(training, say, save))
