"""Moving statistics that stay the same in all replicas of a training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from truenorm._checks import check_integer
from truenorm._keras_internals import strategy_of
from truenorm._model.sites import Layers, chosen_layers
from truenorm._records.synchronization import Synchronization
from truenorm._statistics.collect import known
from truenorm._statistics.synchronize import sync_statistics
from truenorm.callbacks._before_validation import BeforeValidation


class SyncStatistics(BeforeValidation):
    """Give all replicas of a training the same moving statistics, before each validation.

    For training in several processes, or on the devices of ``tf.distribute.MirroredStrategy``,
    whose layers normalise by themselves (no ``synchronized=True``): without it every replica
    validates with statistics of its own part of the data, and a file holds those of one.
    :func:`truenorm.sync_statistics` has the formula. Where there is one replica it does nothing.

    Args:
        every: In every so many epochs (before validation, or at the epoch's end where there is
            none), and when the training ends if any were trained since. The same in all processes.
        count: What this process's statistics count for, as in :func:`truenorm.sync_statistics`.
            None: the training steps that it has made since the last time, each replica as many.
        layers: As in :func:`truenorm.freeze`; None for every BatchNormalization.

    Attributes:
        last: The last :class:`truenorm.Synchronization`; None before the first.

    Raises:
        OptionError: ``every`` or ``count`` is not a positive integer.
        ModelError: When ``fit`` begins: the model has no BatchNormalization, one with domains, or
            one of a user's own class among ``layers``.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization()
        >>> model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> callback = tn.callbacks.SyncStatistics()
        >>> x = np.ones((8, 4), "float32")
        >>> history = model.fit(x, x[:, :1], callbacks=[callback], verbose=0)
        >>> print(callback.last)
        Nothing to synchronize: this process is alone, and its statistics stay
    """

    def __init__(self, every: int = 1, *, count: int | None = None, layers: Layers = None) -> None:
        super().__init__(every)
        self.count = None if count is None else check_integer("count", count)
        self.layers = layers
        self.last: Synchronization | None = None
        self._steps = self._epochs = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuse at once what could not be done at the end of an epoch."""
        known(chosen_layers(self.model, self.layers))
        self._steps = self._epochs = 0
        super().on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count."""
        super().on_epoch_begin(epoch, logs)
        self._epochs += 1

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Count."""
        self._steps += 1

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """What was trained since the last time; the same epochs in all processes."""
        self._fitting = False
        if self._epochs:
            self.act()

    def act(self) -> None:
        """Synchronize."""
        model: Any = self.model
        count = self._steps if self.count is None else self.count
        self._steps = self._epochs = 0
        strategy = strategy_of(model.optimizer) if getattr(model, "optimizer", None) else None
        with nullcontext() if strategy is None else strategy.scope():
            self.last = sync_statistics(model, count=count, layers=self.layers)
