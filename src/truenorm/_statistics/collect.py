"""The population statistics of every BatchNormalization over a whole data set: look, and put in.

:mod:`.runner` runs the model, :mod:`.tally` adds up; what a site sees depends on which statistics
the layers before it use meanwhile (``upstream``), and where these are to be the population's own,
:mod:`.fixed_point` finds them in several passes. Where several processes run the same code, each
reads its share and all get the whole (:mod:`.distributed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from truenorm._checks import known_options, meant
from truenorm._errors import DataError, ModelError, OptionError
from truenorm._model.data import check_limits, input_batches, limited, number_of_batches
from truenorm._model.domains import of_domain, require_one_domain
from truenorm._model.progress import Wanted, shown
from truenorm._model.sites import Layers, chosen_layers, is_own_class
from truenorm._records.population import Population
from truenorm._records.tables import counted, number
from truenorm._statistics.distributed import Processes
from truenorm._statistics.fixed_point import Sample, settle
from truenorm._statistics.runner import Runner, Use
from truenorm._statistics.tally import Pass, Tally

Upstream = Literal["batch", "population", "moving"]
Until = Literal["end", "converged"]

CONVERGED = 0.02
"""Standard error, in standard deviations, at which ``until="converged"`` stops: a fiftieth."""

_LEAST_BATCHES = 16
"""An error estimated from fewer batches is itself too uncertain to stop at."""


@known_options
def collect(
    model: Any,
    data: Any,
    *,
    upstream: Upstream = "batch",
    batch_size: int = 32,
    max_batches: int | None = None,
    max_samples: int | None = None,
    until: Until = "end",
    shard: bool | None = None,
    progress: Wanted = None,
    layers: Layers = None,
    domain: int | None = None,
) -> Population:
    r"""Mean and variance of every BatchNormalization's input over a whole data set.

    For a layer that sees values :math:`x` in batches :math:`b` of :math:`n_b` values each, exactly

    .. math:: \mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \qquad
              \sigma^2 = \frac{\sum_b n_b \left(\sigma_b^2 + (\mu_b - \mu)^2\right)}{\sum_b n_b}

    (law of total variance): weighted by count, with the variance of the batch means, so a ragged
    last batch does no harm. Against a computation in float64 in one shot the mean is within 3e-8
    standard deviations and the variance within 2e-7 of itself, however large the mean; on JAX, by
    the compiled passes (on a processor, without a mask), and for batches of up to 2048 values per
    channel everywhere, within 1e-12. The model is run in inference mode and nothing in it changes.

    Args:
        model: Any built Keras model, subclassed ones too.
        data: What ``fit`` takes: arrays, ``(x, y)``, a PyDataset, or an iterable of batches
            (``tf.data``, PyTorch's ``DataLoader``, grain, a list, a generator), read once per pass
            (so no generator for ``"population"``).
        upstream: Which statistics the BatchNormalization layers *before* a site use meanwhile.
            ``"batch"``: the batch's own, as in training; one pass. ``"population"``: the
            population's, as after recalibration; a few passes (``passes`` of the result), however
            deep the model. ``"moving"``: the moving statistics as they are, which is what inference
            sees now; one pass.
        batch_size: For arrays only. With ``"batch"`` it should be that of training.
        max_batches: Read no more batches than this, per pass.
        max_samples: Read no more samples than this, per pass; the last batch is cut.
        until: ``"end"`` of the data, or ``"converged"``: when the standard error of every layer's
            statistics is at most 0.02 standard deviations. The batches have to be drawn at random.
        shard: With several processes (``torch.distributed``, ``jax.distributed``, inside the scope
            of a multi-worker ``tf.distribute`` strategy) all get the population of all. True: all
            have the same data, and each takes every n-th batch. False: each has its own part. None:
            True, unless the data is a ``DataLoader`` with a ``DistributedSampler``.
        progress: Whether to show how far it is, on the standard error stream. None: on a terminal
            and in a notebook, and of several processes the first.
        layers: Which BatchNormalization layers, as in :func:`truenorm.freeze`; None for all. The
            others normalise with their moving statistics meanwhile, as frozen ones do in training.
        domain: Of a model whose layers have several (:func:`truenorm.domain`): the one that the
            data is of.

    Returns:
        The population, per layer path; shared layers have the moments of all their calls.

    Raises:
        ModelError: The model has no BatchNormalization, is not built, or has one of a user's own
            class among ``layers``; or calls one inside a vectorised map or the like, out of which
            nothing can be told.
        DataError: The data is empty, endless, or does not fit the model.
        OptionError: An option is something else.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((1,)), layer])
        >>> population = tn.collect(model, np.array([[1.0], [2.0], [6.0]]), batch_size=2)
        >>> population.sites["bn"].mean.round(4), population.sites["bn"].variance.round(4)
        (array([3.]), array([4.6667]))

    Reference:
        Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3, arXiv:2105.07576.
    """
    runner = runner_of(model if domain is None else of_domain(model, domain), layers)
    return Collection(
        runner,
        data,
        upstream=upstream,
        batch_size=batch_size,
        max_batches=max_batches,
        max_samples=max_samples,
        until=until,
        shard=shard,
        progress=progress,
    ).population()


class Collection:
    """A data set as :func:`collect` reads it: pass by pass, each over the same batches.

    Args:
        runner: Of :func:`runner_of`; it may have been used before, and is compiled then.
        data: As in :func:`collect`, and so are the options.
    """

    def __init__(
        self,
        runner: Runner,
        data: Any,
        *,
        upstream: Upstream = "batch",
        batch_size: int = 32,
        max_batches: int | None = None,
        max_samples: int | None = None,
        until: Until = "end",
        shard: bool | None = None,
        progress: Wanted = False,
    ) -> None:
        _choice("upstream", upstream, ("batch", "population", "moving"))
        _choice("until", until, ("end", "converged"))
        if shard not in (True, False, None):
            raise OptionError(
                "Whether processes share the data is said by a boolean",
                where="shard",
                expected="True, False or None",
                received=repr(shard),
            )
        ends = until == "converged" and max_batches is None  # by itself
        check_limits(data, 1 if ends else max_batches, max_samples)
        if upstream == "population" and isinstance(data, Iterator):
            raise DataError(
                "With upstream='population' the data is read several times",
                where="data",
                expected="arrays, or an iterable that begins anew each time",
                received=f"an iterator ({type(data).__name__}), which is empty after its first "
                "pass",
                remedy="give what the iterator was made of, or a list of its batches",
            )
        self.runner, self.data, self.upstream, self.batch_size = runner, data, upstream, batch_size
        self.max_batches, self.max_samples = max_batches, max_samples
        self.until_converged = until == "converged"
        self.processes = Processes(runner, data, shard)
        self.progress = progress if self.processes.is_first else progress or False

    def population(self) -> Population:
        """Read it as often as it takes."""
        runner, agreement, passes = self.runner, None, 1
        with shown(self.progress, "collecting") as self._line:
            self._passes = 0
            if self.upstream == "population":
                seen, passes, agreement = settle(runner, self.one_pass, self.processes.first_of)
            else:
                seen = self.one_pass(runner.moving() if self.upstream == "moving" else runner.own())
        paths = [path for path in runner.slices if path in seen.sites]
        return Population(
            {path: seen.sites[path] for path in paths},
            seen.samples,
            seen.batches,
            self.upstream,
            passes,
            {path: seen.spread[path] for path in paths},
            agreement,
        )

    def one_pass(self, use: Use, sample: Sample | None = None) -> Pass:
        """One pass of all processes together, of which a sample may be drawn."""
        seen = self.processes.together(lambda: self._read(use, sample))
        if not seen.samples:
            raise DataError(
                "There is no data to take statistics of",
                where="data",
                expected="at least one sample",
                received="none",
                remedy="give data that can be read again: a generator is empty after its first "
                "pass",
            )
        return seen

    def _read(self, use: Use, sample: Sample | None) -> Pass:
        """The share of this process."""
        inputs = input_batches(self.runner.model, self.data, self.batch_size)
        batches = self.processes.share(limited(inputs, self.max_batches, self.max_samples))
        if sample is not None:
            batches = sample.drawn_from(batches)
        self._passes += 1
        self._line.begin()
        self._total = self._batches_in_all()
        seen = self.runner.one_pass(batches, use, self._enough)
        if self.until_converged:  # every further pass is to read the same batches
            self.until_converged = False
            self.max_batches = seen.batches * self.processes.stride
        return seen

    def _batches_in_all(self) -> int | None:
        """How many batches this process is going to read, if that is known."""
        total = number_of_batches(self.runner.model, self.data, self.batch_size)
        known = [n for n in (total, self.max_batches) if n is not None]
        if not known or self.until_converged or self.max_samples is not None:
            return None
        return -(-min(known) // self.processes.stride)

    def _enough(self, tally: Tally) -> bool:
        if self._line.due():
            seen = tally.seen()
            error = max((_error(seen, path) for path in seen.spread), default=0.0)
            self._line.tell(
                f"pass {self._passes}: {counted(seen.samples, 'sample')}, "
                f"standard error {number(error, 2)} std",
                seen.batches / self._total if self._total else None,
            )
        return self.until_converged and _converged(tally.seen())


def runner_of(model: Any, layers: Layers = None) -> Runner:
    """What :class:`Collection` needs; good for as long as the model has the same variables."""
    return Runner(model, known(chosen_layers(model, layers)))


def known(layers: dict[Any, str]) -> dict[Any, str]:
    """The layers, each of a class whose arithmetic is known."""
    require_one_domain(layers)
    for layer, path in layers.items():
        if is_own_class(layer):
            raise ModelError(
                "What a custom subclass of BatchNormalization normalises with is not known",
                where=path,
                expected="Keras's BatchNormalization or truenorm's",
                received=type(layer).__name__,
                remedy="name the layers that are to be looked at: layers=[…]",
            )
    return layers


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        kinds = {"upstream": "upstream statistics", "until": "end of a collection"}
        raise OptionError(
            f"There is no such choice of {kinds[name]}",
            where=name,
            expected=", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}",
            received=repr(value),
            remedy=meant(value, choices),
        )


def _converged(seen: Pass) -> bool:
    return seen.batches >= _LEAST_BATCHES and all(
        _error(seen, path) <= CONVERGED for path in seen.spread
    )


def _error(seen: Pass, path: str) -> float:
    return seen.spread[path].standard_error(seen.sites[path])
