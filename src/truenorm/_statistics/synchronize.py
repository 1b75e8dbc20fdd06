"""One set of moving statistics for processes and replicas whose own have drifted apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from truenorm._checks import check_integer
from truenorm._errors import DataError, OptionError
from truenorm._kernels import replicas
from truenorm._kernels import sums as collecting
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.sites import Layers, chosen_layers
from truenorm._model.values import of_replicas
from truenorm._records.moments import Array, Moments
from truenorm._records.population import Population
from truenorm._records.synchronization import Synchronization
from truenorm._records.tables import counted
from truenorm._statistics.collect import known
from truenorm._statistics.recalibrate import recalibrate

_FAILED = -1.0

Count = int | Sequence[int]


def sync_statistics(model: Any, *, count: Count = 1, layers: Layers = None) -> Synchronization:
    r"""Give all replicas of a training the same moving statistics; in place, with ``undo()``.

    Where each replica (a process, or a device of ``tf.distribute``) normalises with its own batches
    (no ``synchronized=True``), its moving statistics are of its own data, and whoever saves the
    model saves those of one. Here each gets those of all data. With replica :math:`r` counting
    :math:`n_r` and :math:`w_r = n_r / \sum n`,

    .. math:: \mu = \sum_r w_r \mu_r, \qquad
              \sigma^2 = \sum_r w_r \left(\sigma_r^2 + (\mu_r - \mu)^2\right)

    (law of total variance): the second term is the variance *between* the replicas' means, which
    an average of their variances lacks. It is what ``moving_variance`` would be of one replica that
    saw the data of all. The parts are merged in float64 and in the same order everywhere, so the
    replicas have the same bits afterwards. What ``renorm`` keeps besides follows, as in
    :func:`truenorm.recalibrate`. A channel that is not a finite number in one replica does not
    count there.

    Every process has to call it, at the same place: ``torch.distributed``, ``jax.distributed``, or
    inside the scope of a multi-worker ``tf.distribute`` strategy. The replicas of one process, as
    those of ``tf.distribute.MirroredStrategy``, are found in the variables of the model, wherever
    it is called. Where there is only one replica it changes nothing, and the record says so.
    (Statistics that are the same everywhere stay as they are: with ``synchronized=True``, under
    ``keras.distribution``.)

    Args:
        model: The same model in each process.
        count: What this process's statistics count for, 0 or more: the samples or steps that it has
            trained on. Equal by default. Of several replicas in a process each counts for so much,
            or for its own of as many numbers.
        layers: Which BatchNormalization layers, as in :func:`truenorm.freeze`; None for all.

    Returns:
        How far this process's statistics had drifted (those of its farthest replica), and
        ``undo()``.

    Raises:
        ModelError: The model has no BatchNormalization, is not built, or has one of a user's own
            class among ``layers``.
        OptionError: ``count`` is not 0 or a positive integer, or one for each replica.
        DataError: No replica counts for anything; or another process has failed.

    Example:
        >>> import keras, truenorm as tn
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> print(tn.sync_statistics(model))
        Nothing to synchronize: this process is alone, and its statistics stay
    """
    processes = collecting.processes()[1]
    try:
        own = known(chosen_layers(model, layers))
        counts = _counts(count, max(len(replicas.parts(layer.moving_mean)) for layer in own))
    except Exception:
        if processes > 1:  # so that the others do not wait
            collecting.gather(np.array([_FAILED]))
        raise
    if processes == len(counts) == 1:
        return Synchronization(counts, (), lambda: None)
    totals = _of_all_processes(np.array([float(sum(counts))]))
    if any(_FAILED in total for total in totals):
        raise DataError(
            "Another process that synchronizes statistics with this one has failed",
            remedy="see what it says itself",
        )
    if not sum(map(sum, totals)):
        raise DataError("The statistics of no process count for anything", received="count=0")
    rows = np.concatenate([_rows(layer, counts) for layer in own], axis=2)
    of_all = _of_all_processes(np.concatenate([np.array(counts, np.float64), rows.ravel()]))
    everyones = tuple(int(n) for vector in of_all for n in vector[: len(counts)])
    merged = reduce(
        Moments.merge,
        (
            Moments(*replica)
            for vector in of_all
            for replica in vector[len(counts) :].reshape(rows.shape)
        ),
    )
    ends = np.cumsum([0, *(int(layer.moving_mean.shape[0]) for layer in own)])
    slices = {path: slice(*ends[i : i + 2]) for i, path in enumerate(own.values())}
    sites = {path: merged[part] for path, part in slices.items()}
    population = Population(sites, sum(everyones), len(everyones), "moving", 1)
    done = recalibrate(model, population)
    return Synchronization(everyones, done.before, done.undo, len(counts))


def _of_all_processes(vector: Array) -> list[Array]:
    return collecting.gather(vector) if collecting.processes()[1] > 1 else [vector]


def _counts(count: Count, parts: int) -> tuple[int, ...]:
    """What each replica of this process counts for."""
    if not isinstance(count, Sequence):
        return (check_integer("count", count, least=0),) * parts
    if len(count) != parts:
        raise OptionError(
            "count has to be one number, or one for each replica in this process",
            expected=counted(parts, "number"),
            received=f"{len(count)}",
        )
    return tuple(check_integer("count", one, least=0) for one in count)


def _rows(layer: BatchNormalizationLike, weights: tuple[int, ...]) -> Any:
    """Count, mean and M2 of a layer's channels in each replica; no count where one is not finite.

    Each counts twice: of a single value there would be no variance to put in.
    """
    mean, variance = of_replicas(layer.moving_mean), of_replicas(layer.moving_variance)
    finite = np.isfinite(mean + variance) & (variance >= 0)
    counts = np.where(finite, 2.0 * np.array(weights)[:, None], 0.0)
    some = counts > 0
    parts = [counts, np.where(some, mean, 0.0), np.where(some, counts * variance, 0.0)]
    return np.stack(parts, axis=1)
