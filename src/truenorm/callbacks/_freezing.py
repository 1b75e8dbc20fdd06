"""Freeze BatchNormalization in the last epochs."""

from __future__ import annotations

from typing import Any

import keras

from truenorm._checks import check_integer
from truenorm._layer.arguments import FreezePolicy
from truenorm._model.sites import Layers
from truenorm._modes.freeze import freeze
from truenorm._records.freezing import Freezing


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
