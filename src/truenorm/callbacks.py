"""Callbacks for ``fit``."""

from __future__ import annotations

from typing import Any

import keras

from truenorm._checks import check_integer, check_options
from truenorm._layer.arguments import FreezePolicy
from truenorm._model.sites import Layers
from truenorm._modes.freeze import freeze
from truenorm._records.freezing import Freezing
from truenorm._records.recalibration import Recalibration
from truenorm._statistics.collect import Collection, collect, runner_of
from truenorm._statistics.recalibrate import recalibrate
from truenorm._statistics.runner import Runner


class FreezeStatistics(keras.callbacks.Callback):
    """Freeze BatchNormalization from an epoch on, until the end of ``fit``.

    In the last epochs a network is then trained as it will be used: normalised with the moving
    statistics, which no longer move. Published advice for large models and for small batches, and
    for training with quantisation. (Keras does not call back where ``fit`` is interrupted: the
    layers are then frozen until the next ``fit`` with this callback, or until ``on_train_end()``.)

    Args:
        after_epoch: Number of epochs that are trained as usual before, 0 or more.
        policy: As in :func:`truenorm.freeze`: ``"statistics"`` (gamma and beta go on learning; only
            truenorm's layer can do this), or ``"all"``.
        layers: As in :func:`truenorm.freeze`; None for every BatchNormalization.

    Raises:
        OptionError: ``after_epoch`` is not 0 or a positive integer.
        ModelError: When ``fit`` begins, not at that epoch: the model has no BatchNormalization, or
            one of Keras's that cannot be frozen in part.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = tn.BatchNormalization()
        >>> model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> late = tn.callbacks.FreezeStatistics(after_epoch=1)
        >>> x = np.ones((8, 4), "float32")
        >>> history = model.fit(x, x[:, :1], epochs=2, callbacks=[late], verbose=0)
        >>> round(float(keras.ops.convert_to_numpy(layer.moving_mean)[0]), 4)  # one step of two
        0.01

    Reference:
        Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 4.2, arXiv:2105.07576.
    """

    def __init__(
        self, after_epoch: int, policy: FreezePolicy = "statistics", layers: Layers = None
    ) -> None:
        super().__init__()
        self.after_epoch = check_integer("after_epoch", after_epoch, least=0)
        self.policy: FreezePolicy = policy
        self.layers = layers
        self._frozen: Freezing | None = None

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Refuse at once what could not be done after hours of training."""
        self.on_train_end()  # a fit that was interrupted did not get there
        freeze(self.model, self.policy, layers=self.layers).undo()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Freeze, when it is time."""
        if epoch >= self.after_epoch and self._frozen is None:
            self._frozen = freeze(self.model, self.policy, layers=self.layers)

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Put the policies of before back."""
        if self._frozen is not None:
            self._frozen.undo()
            self._frozen = None


class Recalibrate(keras.callbacks.Callback):
    """Recalibrate the statistics before each validation, and when the training ends.

    So validation judges the model with the statistics of its weights as they are now, not with an
    average over weights that it had before. Where something replaces the weights, as the averages
    of ``keras.callbacks.SwapEMAWeights`` or ``SWA`` of your own do, list this callback *after* it:
    averaged weights have no statistics of their own until they are recalibrated.

    Training goes on with the statistics that validation had: training does not use them.

    Args:
        data: As in :func:`truenorm.recalibrate`: the training set or a large enough sample of it.
        every: Recalibrate in every so many epochs (before validation, or at the epoch's end where
            there is none), and always when the training ends.
        **options: Those of :func:`truenorm.recalibrate`: ``upstream``, ``batch_size``…

    Attributes:
        last: The last :class:`truenorm.Recalibration`; None before the first.

    Raises:
        OptionError: ``every`` is not a positive integer.

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

    def __init__(self, data: Any, every: int = 1, **options: Any) -> None:
        super().__init__()
        check_options(options, collect)
        self.data, self.every, self.options = data, check_integer("every", every), options
        self.layers: Layers = options.pop("layers", None)
        self.last: Recalibration | None = None
        self._runner: Runner | None = None
        self._due = False
        self._fitting = False

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """From here on a test is a validation."""
        self._fitting, self._due = True, False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Count."""
        self._due = (epoch + 1) % self.every == 0

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Before validation."""
        if self._fitting and self._due:
            self._recalibrate()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Where there was no validation."""
        if self._due:
            self._recalibrate()

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """The weights may have been replaced by their averages after the last epoch."""
        self._fitting = False
        self._recalibrate()

    def _recalibrate(self) -> None:
        self._due = False
        if self._runner is None or self._runner.model is not self.model:
            self._runner = runner_of(self.model, self.layers)  # compiled once, not at each call
        population = Collection(self._runner, self.data, **self.options).population()
        self.last = recalibrate(self.model, population)
