"""Plan a study, have its trials run, gather what they found."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import keras

from truenorm._checks import check_integer, known_options
from truenorm._errors import OptionError, OutputError
from truenorm._model.progress import Wanted
from truenorm._records.files import temporary_folder
from truenorm._records.study import Study, Trial
from truenorm._rewrites.place import Position
from truenorm._study import checks
from truenorm._study.analysis import analyse
from truenorm._study.conversions import check_conversions
from truenorm._study.datasets import SKLEARN, Parts, Ready, absolute
from truenorm._study.folder import (
    ABOUT,
    DATA,
    Spec,
    open_folder,
    read_about,
    read_result,
    write_data,
    write_json,
)
from truenorm._study.here import Here
from truenorm._study.identity import code_digest
from truenorm._study.live import told
from truenorm._study.local import Local
from truenorm._study.lock import only_driver
from truenorm._study.models import build_of, made
from truenorm._study.plan import Plan
from truenorm._study.pool import OnEvent, Progress, Runner, run_all
from truenorm._study.ray_tasks import RayTasks
from truenorm._study.settings import (
    code_of_variants,
    data_digest,
    model_digest,
    specs_of,
    versions_with,
)
from truenorm._study.surprises import surprises
from truenorm._study.variants import Variants, is_positions, names_in, variants_of

POSITIONS: tuple[Position, ...] = get_args(Position)


@known_options
def study(
    build: Callable[[], Any] | str | Path,
    data: Any,
    *,
    positions: Sequence[str] = POSITIONS,
    variants: Variants | None = None,
    seeds: int | Sequence[int] = 5,
    epochs: int,
    batch_size: int = 64,
    recalibrate: bool = True,
    margin: float | None = None,
    threshold: float | None = None,
    callbacks: Callable[[], Any] | None = None,
    directory: str | Path | None = None,
    name: str = "study",
    backend: str | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    runner: str = "local",
    resources: Mapping[str, Any] | None = None,
    on_event: OnEvent | None = None,
    progress: Wanted = None,
) -> Study:
    """Train versions of one model, as with BatchNormalization at each position; say what is better.

    A paired experiment. For each seed every variant is made from the same model, so all start from
    the same kernels, and all see the same batches in the same order. Then only the variant differs
    within a seed, and the differences between variants, one per seed, are what is analysed.

    Each trial is a process of its own. When several run at once, each gets its share of the cores
    (by environment variables, where you have not set them: ``OMP_NUM_THREADS``,
    ``OPENBLAS_NUM_THREADS``, ``MKL_NUM_THREADS``, ``TF_NUM_INTRAOP_THREADS``,
    ``TF_NUM_INTEROP_THREADS``, ``NPROC`` for XLA), and takes memory of a GPU as it needs it.

    Args:
        build: Called without arguments in each trial, returns a compiled model, with any layers,
            losses and metrics of your own. Positions need a functional or Sequential model with
            BatchNormalization at its activations. Or a name: ``package.module:function``; a
            ``.keras`` file, opened by :func:`truenorm.archive.load`, its weights drawn anew for
            each seed; ``applications:ResNet50``; or a family with sizes, ``mlp:64-64``,
            ``cnn:16-32``, ``resnet:16-32``.
        data: ``((x_train, y_train), (x_val, y_val))``, NumPy arrays of finite numbers, samples
            first, perhaps with a third pair to test. Or a function that is called with the seed
            (and with ``batch_size``, if it takes one) in each trial, and returns ``(train,
            validation)`` or ``(train, validation, test)``, each what ``fit`` takes, or a dict of
            these with ``steps_per_epoch`` and so on. Or a name: ``digits``, ``breast_cancer``,
            ``wine``, ``diabetes``; ``keras:mnist``; ``FILE.npz`` with ``x`` and ``y``;
            ``FILE.csv:TARGET``; a folder with one folder of images for each class. Named data is
            split by the seed, 60% / 20% / 20%, classes with equal shares. Of arrays, the part of
            the training set that does not fill a last batch is left out in each epoch, other
            samples each time. The test part is looked at once, and decides nothing.
        positions: Two or more of ``none``, ``before_activation``, ``after_activation`` and, for
            residual networks, ``before_layer``; see :func:`truenorm.place`.
        variants: In place of positions: two or more of these and of the conversions ``group``
            (``group:16`` with 16 groups), ``layer``, ``affine``, ``truenorm``, ``keras``; see
            :func:`truenorm.replace`. Or a mapping from names of yours to one of them, a function
            from model to model, None (the model as it is built), or a :class:`truenorm.Variant`.
        seeds: How many (0, 1, …), or which.
        epochs: How often the training data is gone through.
        batch_size: Samples per step.
        recalibrate: Judge each trained model with every BatchNormalization's statistics computed
            over the whole training set (:func:`truenorm.recalibrate`), so that a moving average
            that lags behind does not decide; the history, and the models that are kept, have the
            moving averages. False: judge with the moving averages.
        margin: The smallest difference of interest in the deciding metric, in its units (0.005 is
            half a point of accuracy). With it "equivalent" can be shown, not only "no difference
            shown".
        threshold: Count the epochs until the deciding metric is as good as this.
        callbacks: Called in each trial, returns a list of Keras's callbacks. A training that they
            end early counts, and is marked.
        directory: The study's folder; its results are kept, and a study that was stopped goes on
            when it is called again with the same arguments. None: a temporary folder, removed at
            the end (the trained models with it).
        name: Title of the study, for tables.
        backend: ``jax``, ``tensorflow`` or ``torch`` for the trials; None: the one in use here.
        workers: How many trials run at once; None: one per core, or all that a cluster has room
            for.
        timeout: Longest time of one trial, in seconds; one that takes longer has failed.
        runner: ``local``: a process of this machine for each trial. ``here``: this process, one
            trial after the other, for models that train in seconds. ``ray``: tasks of the Ray
            cluster that this process is connected to, or of one on this machine; or the address
            of a cluster.
        resources: Options of Ray's tasks, such as ``{"num_cpus": 4, "num_gpus": 1}``.
        on_event: Called in this thread with a :class:`Progress` for every start, epoch and end.
        progress: Whether to show how far it is, on the standard error stream. None: on a terminal
            and in a notebook, unless ``on_event`` is given.

    Returns:
        The trials, summaries, paired comparisons and the verdict. A failed trial is among the
        trials with its ``error``; its seed is then left out for all variants, or the variant if
        none of its trials finished.

    Raises:
        DataError: The arrays do not fit together or the model.
        ModelError: ``build`` did not give a compiled model, or one that cannot be varied so.
        OptionError: An argument has an impossible value.
        StudyError: The folder belongs to another study or is in use, nothing answers at the
            cluster's address, or too few trials finished to compare anything.
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
            result.report("study.html")
            result.winner   # a position, or None where none is shown to be best

        What is compared can be anything::

            tn.study(build, "photos/", epochs=10, margin=0.005, variants={
                "stock": None,
                "ghost batches": lambda m: tn.replace(m, "truenorm").model,
                "small batches": tn.Variant(batch_size=8, learning_rate=3e-4),
            })

    Note:
        Choose the number of seeds and the margin beforehand. Adding seeds until a difference shows
        would make one show sooner or later where there is none; a folder therefore takes no more
        of them.

    Reference:
        Student's paired t-test over seeds, Holm's correction over the pairs of variants, two
        one-sided tests for equivalence, exact sign flips: see ``truenorm._study.analysis`` and the
        files beside it for the formulas, and ``docs/study.md`` for how often they are wrong.
    """
    chosen = backend or keras.config.backend()
    checks.check_backend(chosen)
    if variants is None:
        variants = checks.check_positions(positions)
    named, numbers = variants_of(variants), checks.check_seeds(seeds)
    for option, value in (("epochs", epochs), ("batch_size", batch_size), ("workers", workers)):
        if option != "workers" or value is not None:
            check_integer(option, value)
    checks.check_timeout(timeout)
    checks.check_margin(margin)
    checks.check_threshold(threshold)
    checks.check_runner(runner)
    arrays, function = _data(data)
    plan = Plan(build_of(build), function, named, callbacks)
    model, notes = _tried(plan, arrays, numbers[0], batch_size)
    if arrays is not None and not recalibrate:
        steps = epochs * max(1, len(arrays.train[0]) // batch_size)
        notes = (*checks.check_momentum(model, steps), *notes)
    settings: dict[str, Any] = {
        "positions": list(named),
        **({} if is_positions(named) else {"variants": code_of_variants(named)}),
        "seeds": list(numbers),
        "epochs": epochs,
        "batch_size": batch_size,
        "recalibrate": recalibrate,
        "margin": margin,
        "threshold": threshold,
        "backend": chosen,
        "versions": versions_with(chosen),
        "floatx": keras.config.floatx(),
        "dtype_policy": keras.config.dtype_policy().name,
        "data": data_digest(arrays, function),
        "model": model_digest(model),
        **({} if callbacks is None else {"callbacks": code_digest(callbacks)}),
    }
    with temporary_folder() if directory is None else nullcontext(directory) as place:
        folder = Path(place).resolve()
        specs = specs_of(settings, keep_models=directory is not None)
        with _opened(folder, settings):
            about: dict[str, Any] = {"name": name, "notes": list(notes), "command": _command()}
            with _writing(folder):
                trials, todo = _prepare(folder, specs, plan, arrays)
                if todo:
                    about["date"] = f"{datetime.now(UTC):%Y-%m-%d, %H:%M} UTC"
                    write_json(folder / ABOUT, about)
                else:
                    about |= {key: read_about(folder)[key] for key in ("command", "date")}
            if todo:
                crew = _runner(runner, folder, chosen, workers, timeout, resources)
                with told(False if progress is None and on_event else progress) as tell:
                    trials += run_all(
                        folder, todo, crew, on_event=_both(on_event, tell), finished=trials
                    )
    return judged(trials, settings, about)


def _both(first: OnEvent | None, second: OnEvent | None) -> OnEvent:
    """A listener that hands each event on to both, where there are both."""

    def tell(event: Progress) -> None:
        for one in filter(None, (first, second)):
            one(event)

    return tell


def _runner(
    runner: str,
    folder: Path,
    backend: str,
    workers: int | None,
    timeout: float | None,
    resources: Mapping[str, Any] | None,
) -> Runner:
    if runner == "local":
        return Local(folder, backend=backend, workers=workers, timeout=timeout)
    if runner == "here":
        if backend != keras.config.backend() or timeout is not None:
            raise OptionError(
                "In this process there is one backend, and no trial can be ended",
                where="runner",
                expected=f"backend {keras.config.backend()} and no timeout, or another runner",
                received=f"'here', backend {backend}, timeout {timeout}",
            )
        return Here(folder)
    return RayTasks(
        folder,
        address=runner,
        backend=backend,
        workers=workers,
        timeout=timeout,
        resources=resources,
    )


def _data(data: Any) -> tuple[Parts | None, Callable[..., Any] | None]:
    """Arrays, or the function of the seed that gives the data."""
    if isinstance(data, str | Path):
        return None, Ready(str(data) if str(data) in SKLEARN else absolute(str(data)))
    if callable(data):
        return None, data
    pairs = checks.check_data(data[:2] if isinstance(data, tuple) and len(data) == 3 else data)
    test = None
    if len(data) == 3:
        test = checks.check_data((pairs[0], data[2]))[1]
    return Parts(*pairs, test), None


def _tried(
    plan: Plan, arrays: Parts | None, seed: int, batch_size: int
) -> tuple[Any, tuple[str, ...]]:
    """The model of the first seed, after every variant was made once; and what to say of them.

    What cannot be made is better known now than after hours of training.
    """

    def built() -> Any:
        made_ = made(plan.build, lambda: plan.parts(arrays, seed, batch_size), seed)
        checks.check_model(made_, None if arrays is None else arrays.train[0])
        return made_

    model = built()
    positions, conversions = names_in(plan.variants)
    notes = (*checks.check_placement(model, positions), *check_conversions(model, conversions))
    same: dict[tuple[str, int | None], list[str]] = {}
    for name, variant in plan.variants.items():
        key = (model_digest(variant.applied(built())), variant.batch_size)
        same.setdefault(key, []).append(name)
    twins = tuple(
        f"Caution: {' and '.join(names)} are the same model with the same settings, so that any "
        "difference between them is chance."
        for names in same.values()
        if len(names) > 1
    )
    return model, (*notes, *twins)


@contextmanager
def _opened(folder: Path, settings: Mapping[str, Any]) -> Generator[None]:
    """The folder, held by this process alone and made ready for this study."""
    with ExitStack() as stack:
        with _writing(folder):
            (folder / "trials").mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_driver(folder))
            open_folder(folder, settings)
        yield


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            "The study's folder cannot be written",
            where=str(folder),
            received=str(error),
            remedy="give a folder that you may write to, on a disk with room",
        ) from error


def _prepare(
    folder: Path, specs: Sequence[Spec], plan: Plan, arrays: Parts | None
) -> tuple[list[Trial], list[Spec]]:
    """Write what the trials start from; back come the trials that are there and those to run."""
    kept = {spec: read_result(folder, spec) for spec in specs}
    todo = [spec for spec, trial in kept.items() if trial is None]
    if todo:
        plan.write(folder)
        if arrays is not None and not (folder / DATA).exists():
            write_data(folder, arrays)
    return [trial for trial in kept.values() if trial is not None], todo


def judged(trials: Sequence[Trial], settings: Mapping[str, Any], about: Mapping[str, Any]) -> Study:
    """What the trials show, with what is known of how they were made."""
    return analyse(
        trials,
        positions=settings["positions"],
        name=about["name"],
        settings={**settings, "command": about["command"], "date": about["date"]},
        notes=(*about["notes"], *surprises(trials)),
        margin=settings["margin"],
    )


def _command() -> str:
    """What repeats this study: the command or script of this process."""
    first, *rest = sys.argv or [""]
    name = "truenorm" if first.endswith("__main__.py") else Path(first).name
    return shlex.join([name, *rest] if name == "truenorm" else ["python", name, *rest])
