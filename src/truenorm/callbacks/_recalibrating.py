"""Recalibrate in ``fit``."""

from __future__ import annotations

from typing import Any

from truenorm._checks import check_integer, check_options
from truenorm._errors import OptionError
from truenorm._model.domains import check_domain
from truenorm._model.sites import Layers, chosen_layers
from truenorm._records.population import Population
from truenorm._records.recalibration import Recalibration
from truenorm._statistics.collect import Collection, collect, known, runner_of
from truenorm._statistics.recalibrate import on_domain, recalibrate
from truenorm._statistics.runner import Runner
from truenorm.callbacks._before_validation import BeforeValidation


class Recalibrate(BeforeValidation):
    """Recalibrate the statistics before each validation, and when the training ends.

    So validation judges the model with the statistics of its weights as they are now, not with an
    average over weights that it had before. Where something replaces the weights, as the averages
    of ``keras.callbacks.SwapEMAWeights`` or ``SWA`` of your own do, list this callback *after* it:
    averaged weights have no statistics of their own until they are recalibrated.

    Training goes on with the statistics that validation had: training does not use them.

    Args:
        data: As in :func:`truenorm.collect`: the training set or a large enough sample of it. No
            ``Population``, which is of weights as they once were.
        every: Recalibrate in every so many epochs (before validation, or at the epoch's end where
            there is none), and always when the training ends.
        domain: As in :func:`truenorm.recalibrate`, of a model whose layers have domains: the one
            that the data is of, and whose statistics are set. A callback for each domain has all of
            them recalibrated. The model of that domain is made and compiled anew each time, so
            ``layers`` are meant by path or predicate.
        **options: Those of :func:`truenorm.recalibrate`: ``upstream``, ``batch_size``…

    Attributes:
        last: The last :class:`truenorm.Recalibration`; None before the first.

    Raises:
        OptionError: ``data`` is a population, ``every`` not a positive integer, ``domain`` not an
            integer of 0 or more; when ``fit`` begins: the model has no such domain.
        ModelError: When ``fit`` begins: the model has no BatchNormalization, one of a user's own
            class among ``layers``, or one with domains, of which none is named.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization()
        >>> model = keras.Sequential([keras.Input((1,)), layer, keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x = np.array([[0.0], [2.0], [4.0], [6.0]], "float32")
        >>> callback = tn.callbacks.Recalibrate(x)
        >>> history = model.fit(x, x, epochs=1, callbacks=[callback], verbose=0)
        >>> float(keras.ops.convert_to_numpy(layer.moving_mean)[0])  # not a hundredth of the way
        3.0

    Reference:
        Izmailov et al. (2018), "Averaging Weights Leads to Wider Optima and Better Generalization",
        section 3.2: batch normalization, arXiv:1803.05407.
    """

    def __init__(
        self, data: Any, every: int = 1, *, domain: int | None = None, **options: Any
    ) -> None:
        super().__init__(every)
        check_options(options, collect)
        if isinstance(data, Population):
            raise OptionError(
                "A population is of weights as they once were, and the weights change in fit",
                where="data",
                expected="the training set, or a sample of it",
                received=repr(data),
                remedy="truenorm.recalibrate(model, population) when the training has ended",
            )
        self.domain = None if domain is None else check_integer("domain", domain, least=0)
        self.data, self.options = data, options
        self.layers: Layers = options.pop("layers", None)
        self.last: Recalibration | None = None
        self._runner: Runner | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuse at once what could not be done at the end of an epoch."""
        chosen = chosen_layers(self.model, self.layers)
        if self.domain is None:
            known(chosen)
        else:
            check_domain(self.model, self.domain)
        super().on_train_begin(logs)

    def act(self) -> None:
        """Recalibrate."""
        if self.domain is None:
            self.last = self._recalibrated(self.model)
        else:
            self.last = on_domain(self.model, self.domain, self._recalibrated)

    def _recalibrated(self, model: Any) -> Recalibration:
        runner = self._runner
        if runner is None or runner.model is not model:
            runner = runner_of(model, self.layers)
        if self.domain is None:  # compiled once, not at each call
            self._runner = runner
        population = Collection(runner, self.data, **self.options).population()
        return recalibrate(model, population)
