"""One set of moving statistics for processes whose own have drifted apart."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from truenorm._checks import check_integer
from truenorm._errors import DataError
from truenorm._kernels import sums as collecting
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.sites import Layers, chosen_layers
from truenorm._model.values import as_float64
from truenorm._records.moments import Moments
from truenorm._records.population import Population
from truenorm._records.synchronization import Synchronization
from truenorm._statistics.collect import known
from truenorm._statistics.recalibrate import recalibrate

_FAILED = -1.0


def sync_statistics(model: Any, *, count: int = 1, layers: Layers = None) -> Synchronization:
    r"""Give all processes of a training the same moving statistics; in place, with ``undo()``.

    Where each process normalises with its own batches (no ``synchronized=True``), its moving
    statistics are of its own data, and whoever saves the model saves one process's. Here each gets
    those of all data. With process :math:`r` counting :math:`n_r` and :math:`w_r = n_r / \sum n`,

    .. math:: \mu = \sum_r w_r \mu_r, \qquad
              \sigma^2 = \sum_r w_r \left(\sigma_r^2 + (\mu_r - \mu)^2\right)

    (law of total variance): the second term is the variance *between* the processes' means, which
    an average of their variances lacks. It is what ``moving_variance`` would be of one process that
    saw the data of all. The parts are merged in float64 and in the same order everywhere, so the
    processes have the same bits afterwards. What ``renorm`` keeps besides follows, as in
    :func:`truenorm.recalibrate`. A channel that is not a finite number in one process does not
    count there.

    Every process has to call it, at the same place: ``torch.distributed``, ``jax.distributed``, or
    inside the scope of a multi-worker ``tf.distribute`` strategy. Where there is one process it
    changes nothing, and the record says so. (Statistics that are the same everywhere stay as they
    are: with ``synchronized=True``, under ``keras.distribution``. The devices of one process, as of
    ``tf.distribute.MirroredStrategy``, have statistics of their own, too, and are not reconciled
    here: the first one counts.)

    Args:
        model: The same model in each process.
        count: What this process's statistics count for, 0 or more: the samples or steps that it has
            trained on. Equal by default.
        layers: Which BatchNormalization layers, as in :func:`truenorm.freeze`; None for all.

    Returns:
        How far this process's statistics had drifted, and ``undo()``.

    Raises:
        ModelError: The model has no BatchNormalization, is not built, or has one of a user's own
            class among ``layers``.
        OptionError: ``count`` is not 0 or a positive integer.
        DataError: No process counts for anything; or another one has failed.

    Example:
        >>> import keras, truenorm as tn
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> print(tn.sync_statistics(model))
        Nothing to synchronize: this process is alone, and its statistics stay
    """
    processes = collecting.processes()[1]
    try:
        count = check_integer("count", count, least=0)
        own = known(chosen_layers(model, layers))
    except Exception:
        if processes > 1:  # so that the others do not wait
            collecting.gather(np.array([_FAILED]))
        raise
    if processes == 1:
        return Synchronization((count,), (), lambda: None)
    counts = [float(part[0]) for part in collecting.gather(np.array([float(count)]))]
    if _FAILED in counts:
        raise DataError(
            "Another process that synchronizes statistics with this one has failed",
            remedy="see what it says itself",
        )
    if not sum(counts):
        raise DataError("The statistics of no process count for anything", received="count=0")
    rows = [_rows(layer, count) for layer in own]
    ends = np.cumsum([0, *(part.shape[1] for part in rows)])
    gathered = collecting.gather(np.concatenate(rows, axis=1).ravel())
    parts = [Moments(*vector.reshape(3, -1)) for vector in gathered]
    merged = reduce(Moments.merge, parts)
    slices = {path: slice(*ends[i : i + 2]) for i, path in enumerate(own.values())}
    sites = {path: merged[part] for path, part in slices.items()}
    done = recalibrate(model, Population(sites, int(sum(counts)), len(counts), "moving", 1))
    return Synchronization(tuple(int(n) for n in counts), done.before, done.undo)


def _rows(layer: BatchNormalizationLike, count: int) -> Any:
    """Count, mean and M2 of a layer's channels; no count where a number is not finite.

    Each counts twice: of a single value there would be no variance to put in.
    """
    mean, variance = as_float64(layer.moving_mean), as_float64(layer.moving_variance)
    counts = np.where(np.isfinite(mean + variance) & (variance >= 0), 2.0 * count, 0.0)
    some = counts > 0
    return np.stack([counts, np.where(some, mean, 0.0), np.where(some, counts * variance, 0.0)])
