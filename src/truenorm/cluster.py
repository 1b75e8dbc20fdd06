"""Population statistics on a Ray cluster: each shard where there is room, all of them merged."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import keras

from truenorm import archive
from truenorm._checks import check_options
from truenorm._errors import MissingDependencyError, OptionError
from truenorm._records.population import Population
from truenorm._statistics.collect import collect as collect_here


def collect(
    model: Any,
    shards: Sequence[Any],
    *,
    imports: Collection[str] = (),
    resources: dict[str, Any] | None = None,
    **options: Any,
) -> Population:
    """Collect shards of a data set in Ray tasks, one task each, and merge them.

    Moments merge exactly and in any order, so the result is that of one pass over all shards (each
    batch lies in one shard). Give it to :func:`truenorm.recalibrate` in place of data.

    Args:
        model: A model that a ``.keras`` file can hold; each task loads it, on the backend in use.
        shards: What each task reads: data as :func:`truenorm.collect` takes it, or a function
            without arguments that gives such data, so that it is read where the task runs.
        imports: Modules that register custom classes of the model; each task imports them.
        resources: Options of the tasks, such as ``{"num_gpus": 1}``: see ``ray.remote``.
        **options: Those of :func:`truenorm.collect`.

    Returns:
        The population of all shards.

    Raises:
        MissingDependencyError: Ray is not installed, or not started.
        OptionError: There are no shards; or ``upstream="population"``, which needs all shards in
            each of its passes.
        ArchiveError: The model cannot be loaded from a file.

    Example:
        >>> import truenorm as tn
        >>> import truenorm.cluster
        >>> def shard(index):
        ...     return lambda: load_images(f"part-{index}")
        >>> population = tn.cluster.collect(model, [shard(i) for i in range(64)])  # doctest: +SKIP
        >>> tn.recalibrate(model, population)  # doctest: +SKIP

    Reference:
        Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", The American
        Statistician 37(3).
    """
    check_options(options, collect_here)
    ray = _started_ray()
    if not len(shards):
        raise OptionError("There are no shards", where="shards", expected="one or more")
    if options.get("upstream") == "population":
        raise OptionError(
            "With upstream='population' every pass needs all shards, and tasks have one each",
            where="upstream",
            expected="'batch' or 'moving'",
            received="'population'",
            remedy="collect in processes that run together: torch.distributed, jax.distributed, "
            "or a multi-worker strategy of tf.distribute",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        archive.save(model, path)
        saved = ray.put(path.read_bytes())
    wanted = {"runtime_env": {}, **(resources or {})}
    variables = wanted["runtime_env"].get("env_vars", {})
    environment = {"env_vars": {**variables, "KERAS_BACKEND": keras.config.backend()}}
    wanted["runtime_env"] = {**wanted["runtime_env"], **environment}
    task = ray.remote(**wanted)(_collect_shard)
    tasks = [task.remote(saved, shard, tuple(imports), options) for shard in shards]
    return functools.reduce(Population.merge, ray.get(tasks))


def _collect_shard(
    saved: bytes, shard: Any | Callable[[], Any], imports: Collection[str], options: dict[str, Any]
) -> Population:
    """One task, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        path.write_bytes(saved)
        model = archive.load(path, imports=imports)
    return collect_here(model, shard() if callable(shard) else shard, **options)


def _started_ray() -> Any:
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise MissingDependencyError(
            "Ray is not installed", remedy='pip install "truenorm[ray]"'
        ) from error
    if not ray.is_initialized():
        raise MissingDependencyError(
            "Ray is installed, but this process is not connected to a cluster",
            remedy="call ray.init() first, with the address of a cluster or without",
        )
    return ray
