"""When something is done in ``fit`` so that validation finds it done."""

from __future__ import annotations

from typing import Any

import keras

from truenorm._checks import check_integer


class BeforeValidation(keras.callbacks.Callback):
    """Acts before a validation, at the epoch's end where there is none, and when training ends.

    Args:
        every: Act in every so many epochs.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = check_integer("every", every)
        self._due = False
        self._fitting = False

    def act(self) -> None:
        """What is to be done."""
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """From here on a test is a validation."""
        self._fitting, self._due = True, False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Count."""
        self._due = (epoch + 1) % self.every == 0

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Before validation."""
        if self._fitting and self._due:
            self._act()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Where there was no validation."""
        if self._due:
            self._act()

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Something else may have changed the model after the last epoch."""
        self._fitting = False
        self._act()

    def _act(self) -> None:
        self._due = False
        self.act()
