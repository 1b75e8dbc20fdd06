"""Statistics of another domain, and nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from truenorm._checks import check_options
from truenorm._errors import OptionError
from truenorm._model.sites import batch_normalizations
from truenorm._model.values import as_float64
from truenorm._records.moments import Moments
from truenorm._records.population import Population
from truenorm._records.recalibration import Recalibration
from truenorm._statistics.collect import Upstream, collect
from truenorm._statistics.recalibrate import on_domain, recalibrate


def adapt(
    model: Any,
    data: Any,
    *,
    prior: float = 0,
    upstream: Upstream = "batch",
    batch_size: int = 32,
    domain: int | None = None,
    **options: Any,
) -> Recalibration:
    r"""Give every BatchNormalization the statistics of a target domain; in place, with ``undo()``.

    Adaptive batch normalization: the moving statistics are re-estimated on data of the domain that
    the model is to work in; no labels, no gradient, and gamma, beta and all other weights stay. So
    each channel comes out with the same mean and variance as on the domain of the training.

    A small target set estimates badly. Then the old statistics may count as ``prior`` samples: with
    the moments :math:`(\mu_s, \sigma_s^2)` of before and :math:`(\mu_t, \sigma_t^2)` of :math:`n`
    target samples, and :math:`w = n / (n + \mathtt{prior})`, the moments of both together are

    .. math:: \mu = (1-w)\,\mu_s + w\,\mu_t, \qquad
              \sigma^2 = (1-w)\,\sigma_s^2 + w\,\sigma_t^2 + w(1-w)(\mu_s - \mu_t)^2 .

    Args:
        model: Any built Keras model.
        data: As in :func:`collect`; samples of the target domain.
        prior: How many samples the old statistics count as, 0 or more. 0 forgets them.
        upstream: As in :func:`collect`.
        batch_size: As in :func:`collect`.
        domain: As in :func:`collect`: that of the layers' several domains whose statistics are set.
        **options: The other options of :func:`collect`.

    Returns:
        What :func:`recalibrate` returns.

    Raises:
        OptionError: ``prior`` is negative or not a number.
        ModelError: As in :func:`collect`.
        DataError: As in :func:`recalibrate`.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization()  # moving mean 0
        >>> model = keras.Sequential([keras.Input((1,)), layer])
        >>> target = np.array([[3.0], [5.0]])
        >>> adapted = tn.adapt(model, target, prior=2)
        >>> [float(v) for v in keras.ops.convert_to_numpy(layer.moving_mean)]
        [2.0]
        >>> adapted.undo()

    Reference:
        Li et al. (2016), "Revisiting Batch Normalization For Practical Domain Adaptation",
        arXiv:1603.04779. For ``prior``: Schneider et al. (2020), "Improving robustness against
        common corruptions by covariate shift adaptation", section 3, arXiv:2006.16971; there the
        last term of the variance, that of the two means, is left out.
    """
    check_options(options, collect)
    if not isinstance(prior, Real) or not 0 <= prior < np.inf:
        raise OptionError(
            "The weight of the old statistics is not a number of samples",
            where="prior",
            expected="a number of 0 or more",
            received=repr(prior),
        )
    if domain is not None:
        options |= {"prior": prior, "upstream": upstream, "batch_size": batch_size}
        return on_domain(model, domain, lambda single: adapt(single, data, **options))
    target = collect(model, data, upstream=upstream, batch_size=batch_size, **options)
    sites = dict(_with_prior(model, target, prior)) if prior else target.sites
    return recalibrate(model, replace(target, sites=sites))


def _with_prior(model: Any, target: Population, prior: float) -> Iterator[tuple[str, Moments]]:
    for layer, path in batch_normalizations(model).items():
        if path not in target.sites:
            continue
        moments = target.sites[path]
        count = moments.count * prior / target.samples  # values per channel, as the target's
        mean, variance = as_float64(layer.moving_mean), as_float64(layer.moving_variance)
        yield path, moments.merge(Moments(count, mean, variance * count))
