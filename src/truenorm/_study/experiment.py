"""Plan a study, run its trials in local processes, gather what they found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import keras

from truenorm._checks import check_integer
from truenorm._errors import OutputError
from truenorm._records.files import replacing
from truenorm._records.study import Study, Trial
from truenorm._rewrites.place import Position
from truenorm._study import checks
from truenorm._study.analysis import analyse
from truenorm._study.folder import (
    DATA,
    Arrays,
    Spec,
    open_folder,
    read_result,
    write_arrays,
)
from truenorm._study.pool import run_all
from truenorm._study.progress import OnEvent
from truenorm._study.settings import context, digest

POSITIONS: tuple[Position, ...] = get_args(Position)


def study(
    build: Callable[[], Any],
    data: tuple[Arrays, Arrays],
    *,
    positions: Sequence[str] = POSITIONS,
    seeds: int | Sequence[int] = 5,
    epochs: int,
    batch_size: int = 64,
    recalibrate: bool = True,
    directory: str | Path | None = None,
    name: str = "study",
    backend: str | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    on_event: OnEvent | None = None,
) -> Study:
    """Train one model with BatchNormalization at each position, and say which is better.

    A paired experiment. For each seed the model is built once; every position is made from that
    same model, so all start from the same kernels, and all see the same batches in the same order.
    Then only the position differs within a seed, and the differences between positions, one per
    seed, are what is analysed.

    Each trial is a process of its own. When several run at once, each gets its share of the cores
    (by environment variables, where you have not set them: ``OMP_NUM_THREADS``,
    ``OPENBLAS_NUM_THREADS``, ``MKL_NUM_THREADS``, ``TF_NUM_INTRAOP_THREADS``,
    ``TF_NUM_INTEROP_THREADS``, ``NPROC`` for XLA), and takes memory of a GPU as it needs it.

    Args:
        build: Called without arguments, returns a compiled functional or Sequential model with
            BatchNormalization at its activations. Only layers and functions of Keras and truenorm:
            the trials' processes do not know others.
        data: ``((x_train, y_train), (x_val, y_val))``, NumPy arrays of finite numbers, samples
            first. The part of the training set that does not fill a last batch is left out in each
            epoch, other samples each time.
        positions: Two or more of ``none``, ``before_activation``, ``after_activation`` and, for
            residual networks, ``before_layer``; see :func:`truenorm.place`.
        seeds: How many (0, 1, …), or which.
        epochs: How often the training data is gone through.
        batch_size: Samples per step.
        recalibrate: Judge each trained model with every BatchNormalization's statistics computed
            over the whole training set (:func:`truenorm.recalibrate`), so that a moving average
            that lags behind does not decide; the history, and the models that are kept, have the
            moving averages. False: judge with the moving averages.
        directory: The study's folder; its results are kept, and a study that was stopped goes on
            when it is called again with the same arguments. None: a temporary folder, removed at
            the end (the trained models with it).
        name: Title of the study, for tables.
        backend: ``jax``, ``tensorflow`` or ``torch`` for the trials; None: the one in use here.
        workers: How many trials run at once; None: one per core.
        timeout: Longest time of one trial, in seconds; one that takes longer has failed.
        on_event: Called in this thread with a :class:`Progress` for every start, epoch and end.

    Returns:
        The trials, summaries, paired comparisons and the verdict. A failed trial is among the
        trials with its ``error``; its seed is then left out for all positions.

    Raises:
        DataError: The arrays do not fit together or the model.
        ModelError: ``build`` did not give a compiled functional or Sequential model.
        OptionError: An argument has an impossible value.
        StudyError: The folder belongs to another study, or a position has no finished trial.
        OutputError: The folder cannot be written.
        MissingDependencyError: scipy or the backend is not installed.

    Example:
        A model with BatchNormalization before its activation, and data to try it on:

        >>> import keras
        >>> import numpy as np
        >>> import truenorm as tn
        >>> def build():
        ...     model = keras.Sequential([
        ...         keras.Input((4,)), keras.layers.Dense(8, use_bias=False),
        ...         keras.layers.BatchNormalization(), keras.layers.ReLU(),
        ...         keras.layers.Dense(1, activation="sigmoid")])
        ...     model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
        ...     return model
        >>> x = np.random.default_rng(0).normal(size=(256, 4)).astype("float32")
        >>> y = (x.sum(axis=1) > 0).astype("int32")
        >>> data = (x[:192], y[:192]), (x[192:], y[192:])

        What cannot be done is refused before anything is trained:

        >>> tn.study(build, data, positions=("before_activation", "behind"), epochs=10)
        Traceback (most recent call last):
        truenorm._errors.OptionError: There is no such position (at 'position'). Expected: 'none' \
or 'before_activation' or 'after_activation' or 'before_layer'. Received: 'behind'.

        A study takes a while: a process for each position and seed, here fifteen. ::

            result = tn.study(build, data, epochs=10, directory="my-study")
            print(result)   # tables and verdict
            result.winner   # a position, or None where none is shown to be best

    Note:
        Choose the number of seeds beforehand. Adding seeds until a difference shows would make one
        show sooner or later where there is none; a folder therefore takes no more of them.

    Reference:
        Student's paired t-test over seeds, Holm's correction over the pairs of positions: see
        ``truenorm._study.analysis`` for the formulas.
    """
    chosen = backend or keras.config.backend()
    checks.check_backend(chosen)
    names, numbers = checks.check_positions(positions), checks.check_seeds(seeds)
    epochs = check_integer("epochs", epochs)
    batch_size = check_integer("batch_size", batch_size)
    if workers is not None:
        check_integer("workers", workers)
    checks.check_timeout(timeout)
    arrays = checks.check_data(data)
    model = _built(build, numbers[0], arrays)
    steps = epochs * max(1, len(arrays[0][0]) // batch_size)
    stale = () if recalibrate else checks.check_momentum(model, steps)
    notes = (*stale, *checks.check_placement(model, names))
    settings: dict[str, Any] = {
        "positions": list(names),
        "seeds": list(numbers),
        "epochs": epochs,
        "batch_size": batch_size,
        "recalibrate": recalibrate,
        **context(model, arrays, chosen),
    }
    with tempfile.TemporaryDirectory(prefix="truenorm-") as temporary:
        folder = Path(temporary if directory is None else directory).resolve()
        specs = _specs(settings, keep_models=directory is not None)
        trials, todo = _prepare(folder, settings, specs, build, arrays)
        trials += run_all(
            folder,
            todo,
            backend=chosen,
            workers=workers,
            timeout=timeout,
            on_event=on_event,
            finished=trials,
        )
    return analyse(trials, positions=names, name=name, settings=settings, notes=notes)


def _specs(settings: Mapping[str, Any], *, keep_models: bool) -> list[Spec]:
    """Every trial, seed by seed: what stops a study early leaves whole pairs."""
    return [
        Spec(
            study=digest(settings),
            position=position,
            seed=seed,
            epochs=settings["epochs"],
            batch_size=settings["batch_size"],
            recalibrate=settings["recalibrate"],
            keep_model=keep_models,
            built_on=settings["built_on"],
            floatx=settings["floatx"],
            dtype_policy=settings["dtype_policy"],
        )
        for seed in settings["seeds"]
        for position in settings["positions"]
    ]


def _prepare(
    folder: Path,
    settings: Mapping[str, Any],
    specs: Sequence[Spec],
    build: Callable[[], Any],
    arrays: tuple[Arrays, Arrays],
) -> tuple[list[Trial], list[Spec]]:
    """Make the folder ready; back come the trials that are there and those to run."""
    try:
        open_folder(folder, settings)
        kept = {spec: read_result(folder, spec) for spec in specs}
        todo = [spec for spec, trial in kept.items() if trial is None]
        _write_inputs(folder, todo, build, arrays)
    except OSError as error:
        raise OutputError(
            "The study's folder cannot be written",
            where=str(folder),
            received=str(error),
            remedy="give a folder that you may write to, on a disk with room",
        ) from error
    return [trial for trial in kept.values() if trial is not None], todo


def _built(build: Callable[[], Any], seed: int, arrays: tuple[Arrays, Arrays]) -> Any:
    keras.utils.set_random_seed(seed)
    model = build()
    checks.check_model(model, arrays[0][0])
    return model


def _write_inputs(
    folder: Path, todo: Sequence[Spec], build: Callable[[], Any], arrays: tuple[Arrays, Arrays]
) -> None:
    """Write what the trials start from, where it is not there already."""
    if todo and not (folder / DATA).exists():
        write_arrays(folder, *arrays)
    for seed, base in {spec.seed: folder / spec.base for spec in todo}.items():
        if not base.exists():
            model = _built(build, seed, arrays)
            if not model.optimizer.built:  # else the file has less variables than a loader expects
                model.optimizer.build(model.trainable_variables)
            with replacing(base) as temporary:
                model.save(temporary)
