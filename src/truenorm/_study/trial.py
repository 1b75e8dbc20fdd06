"""One training run in a process of its own: ``python -m truenorm._study.trial SPEC.json``.

What is the same for all positions of a seed: the weights that training starts from (all positions
are made from one saved model) and every batch of every epoch. What differs is the position.

On stdout goes one line per epoch. A parent that is gone has closed the pipe, so an orphan ends at
its next epoch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from truenorm._model.graph import calls, is_batch_normalization
from truenorm._records.files import replacing
from truenorm._records.study import Trial
from truenorm._rewrites.place import Position, place
from truenorm._statistics.recalibrate import recalibrate
from truenorm._study.folder import Arrays, Spec, read_arrays, write_result
from truenorm._study.progress import tell

_STARTED = time.perf_counter()


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

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, seed: int | None) -> None:
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
    """Tells the data which epoch it is, and the parent process the metrics of each epoch."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self._batches.start(epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        tell(epoch + 1, {name: float(value) for name, value in (logs or {}).items()})


def prepare(folder: Path, spec: Spec) -> Any:
    """The compiled model of this trial, before its first step."""
    keras.config.set_floatx(spec.floatx)
    keras.config.set_dtype_policy(spec.dtype_policy)
    keras.utils.set_random_seed(spec.seed)
    base = keras.saving.load_model(folder / spec.base, safe_mode=True)
    model = place(base, cast(Position, spec.position)).model
    if spec.built_on != keras.config.backend():
        # Keras saves what "auto" meant where the model was compiled; elsewhere it means another
        # thing: JAX's True would have torch compile for longer than it trains.
        model.compile_from_config({**model.get_compile_config(), "jit_compile": "auto"})
    return model


def train(model: Any, data: tuple[Arrays, Arrays], spec: Spec) -> dict[str, tuple[float, ...]]:
    """Fit the model; Keras's history comes back."""
    train_data, validation = data
    # Again, since making the model may have drawn numbers, and torch's dropout draws from the
    # global generator whatever seed its layer has.
    keras.utils.set_random_seed(spec.seed)
    batches = Batches(*train_data, spec.batch_size, spec.seed)
    history = model.fit(
        batches,
        validation_data=Batches(*validation, spec.batch_size, None),
        epochs=spec.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[_Epochs(batches)],
    ).history
    return {name: tuple(float(v) for v in values) for name, values in history.items()}


def judge(model: Any, data: tuple[Arrays, Arrays], spec: Spec) -> dict[str, float]:
    """The validation metrics of the trained model; its statistics may be recalibrated for it."""
    train_data, validation = data
    if spec.recalibrate and _sites(model):
        recalibrate(model, train_data, upstream="population", batch_size=spec.batch_size)
    batches = Batches(*validation, spec.batch_size, None)
    metrics = model.evaluate(batches, verbose=0, return_dict=True)
    return {f"val_{name}": float(value) for name, value in metrics.items()}


def _sites(model: Any) -> int:
    return sum(is_batch_normalization(call.operation) for call in calls(model))


def main(path: Path) -> None:
    """Run the trial of this spec and write its result; the model is saved as it was trained."""
    spec, folder = Spec.read(path), path.parent.parent
    model, data = prepare(folder, spec), read_arrays(folder)
    history = train(model, data, spec)
    kept = spec.file(".keras") if spec.keep_model else ""
    if kept:
        with replacing(folder / kept) as temporary:
            model.save(temporary)
    trial = Trial(
        position=spec.position,
        seed=spec.seed,
        history=history,
        final=judge(model, data, spec),
        sites=_sites(model),
        parameters=int(model.count_params()),
        seconds=time.perf_counter() - _STARTED,
        model=kept,
    )
    write_result(folder, spec, trial)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
