"""Rules about gamma, beta and what feeds them: TN201 to TN206."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
from numpy.typing import NDArray

from truenorm._diagnosis import remedies
from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Fault, named
from truenorm._diagnosis.tn1_batches import recalibration_harms
from truenorm._keras_internals import decays
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.sites import fused_activation, is_linear
from truenorm._model.values import as_float64
from truenorm._records.diagnosis import Evidence
from truenorm._records.moments import Array

DEAD = 1e-2
"""|gamma| over the layer's root mean square gamma below which a channel is as good as constant: its
output varies a hundred times less than its neighbours'. (Channels are pruned by |gamma|: Liu et
al., 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv:1708.06519.)
"""

CONSTANT = 1e-2
"""variance / (variance + epsilon) below which epsilon is what normalises: the output's standard
deviation is then less than a tenth of gamma."""

MANY = 0.05
"""Share of constant channels from which a layer loses width that anyone would notice."""

LEAST_EPSILON = 1e-8
"""Below it no epsilon helps: it is next to the rounding of float32, and so is such a channel."""

LARGEST_SCALE = 100.0
"""gamma / sqrt(moving_variance + epsilon): at the stock epsilon of 1e-3 a constant channel with
gamma 1 has 31.6; above 100 a channel that hardly varied in training is amplified so much that any
deviation in inference decides the output."""


def dead_gamma(facts: Facts) -> Iterator[Fault]:
    """TN201."""
    for layer, path in facts.layers.items():
        gamma, dead = gamma_of(layer), is_dead(layer)
        size = float(np.sqrt(np.mean(np.square(gamma))))
        if dead.any():
            evidence = {
                "dead": int(dead.sum()),
                **named(dead),
                "least_gamma": float(np.abs(gamma).min()),
                "typical_gamma": size,
            }
            yield Fault(path, evidence, f"filters={int((~dead).sum())}, or a lower regularization")


def is_dead(layer: BatchNormalizationLike) -> NDArray[np.bool_]:
    """Which channels have next to no gamma."""
    gamma = gamma_of(layer)
    return np.abs(gamma) < DEAD * np.sqrt(np.mean(np.square(gamma)))


def constant_input(facts: Facts) -> Iterator[Fault]:
    """TN202."""
    faults: list[tuple[str, Evidence, float]] = []
    population = None if facts.lacks("data") else facts.seen.training
    for layer, path in facts.layers.items():
        variance = facts.variances.get(path, as_float64(layer.moving_variance))
        if population is not None and path in population.sites:
            variance = population.sites[path].variance
        constant = is_constant(layer, variance)
        if constant.mean() >= MANY:
            evidence = {
                "constant": int(constant.sum()),
                **named(constant),
                "largest_std_of_these": float(np.sqrt(variance[constant].max())),
                "epsilon": float(layer.epsilon),
            }
            faults.append((path, evidence, _largest_epsilon(variance[constant])))
    enough = min((e for _, _, e in faults if e >= LEAST_EPSILON), default=0.0)
    for path, evidence, epsilon in faults:
        smaller = f"train with keras.layers.BatchNormalization(epsilon={enough:.0e})"
        yield Fault(path, evidence, smaller if epsilon >= LEAST_EPSILON else _NEVER_VARY)


_NEVER_VARY = "leave out the channels that never vary: columns of the data, filters before it"


def is_constant(layer: BatchNormalizationLike, variance: Array) -> NDArray[np.bool_]:
    """Which channels of such a variance are as good as constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (variance >= 0) & (variance / (variance + layer.epsilon) < CONSTANT)


def _largest_epsilon(variance: Array) -> float:
    """The largest power of ten with which none of these channels is constant."""
    least = variance.min() * (1 - CONSTANT) / CONSTANT
    return float(10.0 ** np.floor(np.log10(least))) if least > 0 else 0.0


def exploding_scale(facts: Facts) -> Iterator[Fault]:
    """TN203."""
    for layer, path in facts.layers.items():
        scale = _scale(layer, as_float64(layer.moving_variance))
        large = scale > LARGEST_SCALE
        if large.any():
            evidence = {
                "exploding": int(large.sum()),
                **named(large),
                "largest_scale": float(scale[large].max()),
                "median_scale": float(np.nanmedian(scale)),
            }
            yield Fault(path, evidence, _against_the_scale(facts, layer, path))


def _scale(layer: BatchNormalizationLike, variance: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):  # stored variances may be anything
        return np.abs(gamma_of(layer)) / np.sqrt(variance + layer.epsilon)


def _against_the_scale(facts: Facts, layer: BatchNormalizationLike, path: str) -> str:
    """Other statistics, if it is these; where the data itself hardly varies, a smaller gamma."""
    if facts.lacks("data"):
        return remedies.ASK
    sites = facts.seen.training.sites
    right = path in sites and (_scale(layer, sites[path].variance) <= LARGEST_SCALE).all()
    if right and layer not in facts.held and not recalibration_harms(facts):
        return remedies.recalibrate(facts)
    constraint = "gamma_constraint=keras.constraints.MaxNorm(…)"
    return f"train with keras.layers.BatchNormalization({constraint})"


def weight_decay(facts: Facts) -> Iterator[Fault]:
    """TN204."""
    decay = float(getattr(facts.optimizer, "weight_decay", None) or 0.0)
    for layer, path in facts.layers.items():
        names = [n for n in ("gamma", "beta") if getattr(layer, n) is not None]
        regularized = [n for n in names if getattr(layer, f"{n}_regularizer") is not None]
        if regularized:
            remedy = ", ".join(f"{n}_regularizer=None" for n in regularized)
            evidence = {"regularizer_on": " and ".join(regularized)}
            yield Fault(path, evidence, f"keras.layers.BatchNormalization({remedy})")
        decayed = [n for n in names if decay and decays(facts.optimizer, getattr(layer, n))]
        if decayed:
            evidence = {"decay_of": " and ".join(decayed), "weight_decay": decay}
            yield Fault(path, evidence, _spare(facts))


def _spare(facts: Facts) -> str:
    """Keras's optimizers take exclusions until they are built."""
    exclude = 'exclude_from_weight_decay(var_names=["gamma", "beta"])'
    if getattr(facts.optimizer, "built", False):
        return f"a new optimizer, with optimizer.{exclude} before its first step"
    around = ".inner_optimizer" if facts.optimizer is not facts.model.optimizer else ""
    return f"model.optimizer{around}.{exclude}"


def zero_gamma(facts: Facts) -> Iterator[Fault]:
    """TN205."""
    for layer, path in facts.layers.items():
        if layer.gamma is not None:
            began = isinstance(layer.gamma_initializer, keras.initializers.Zeros)
            is_zero = not gamma_of(layer).any()
            if began or is_zero:
                evidence = {"gamma_now": "all zero" if is_zero else "learned"}
                remedy = 'keras.layers.BatchNormalization(gamma_initializer="ones")'
                yield Fault(path, evidence, remedy)


def redundant_bias(facts: Facts) -> Iterator[Fault]:
    """TN206."""
    for site in facts.sites:
        producer = site.only_producer
        if (
            producer is not None
            and is_linear(producer)
            and producer.operation.use_bias
            and not fused_activation(producer)
            and producer.only_consumer is site
        ):
            bias = producer.operation.bias
            evidence = {
                "weights": int(bias.shape[0]),
                "largest_bias": float(np.abs(as_float64(bias)).max()),
            }
            name = type(producer.operation).__name__
            yield Fault(site.path, evidence, f"keras.layers.{name}(…, use_bias=False)")


def gamma_of(layer: BatchNormalizationLike) -> Array:
    """Gamma, or ones."""
    if layer.gamma is None:
        return np.ones(layer.moving_mean.shape)
    return as_float64(layer.gamma)
