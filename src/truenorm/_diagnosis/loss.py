"""The loss and metrics that a model is compiled with, of outputs however they were made."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from truenorm._model.trainer import compile_like
from truenorm._model.values import as_float64

ops: Any = keras.ops

NO_PROBABILITIES = (
    "it takes probabilities, and the model puts out numbers below 0 or above 1, such as logits "
    "(from_logits=True in the loss; --from-logits in the command)"
)

SLACK = 1e-2
"""What rounding in 16 bits makes of a probability."""


class _Outputs(keras.Model):
    """Stands in the place of the model: Keras computes loss and metrics of what it is given."""

    def call(self, outputs: Any) -> Any:
        return outputs


class Judge:
    """Scores a model's outputs, batch by batch.

    Args:
        model: A compiled model.
    """

    def __init__(self, model: Any) -> None:
        self._model: Any = _Outputs(name="judge")
        self._model.output_names = getattr(model, "output_names", None)  # a loss may be given so
        compile_like(model, self._model)
        self.able = getattr(self._model, "loss", None) is not None
        """Whether there is a loss, and the labels so far made it."""
        self.why_not: str | None = None
        """Why the loss means nothing, if that has been seen."""

    def scores(self, outputs: Any, labels: Any) -> dict[str, float]:
        """The loss and metrics of a batch; empty if outputs and labels alone do not make them."""
        if not self.able:
            return {}
        judge = self._model
        if _are_no_probabilities(judge.loss, outputs):
            self.able, self.why_not = False, NO_PROBABILITIES
            return {}
        judge.reset_metrics()
        try:
            loss = judge.compute_loss(None, labels, outputs, None, training=False)
            found = {"loss": loss} | judge.compute_metrics(None, labels, outputs, None)
            found["loss"] = loss  # the judge's own tracker of it was not asked
            return {name: float(as_float64(ops.convert_to_tensor(v))) for name, v in found.items()}
        except Exception:  # labels for a loss of the model's own: an error of any kind
            self.able = False
            return {}


def _are_no_probabilities(losses: Any, outputs: Any) -> bool:
    """Whether a cross-entropy of probabilities gets something else."""
    pairs = zip(keras.tree.flatten(losses), keras.tree.flatten(outputs), strict=False)
    return any(_wants_probabilities(loss) and _leaves_0_to_1(output) for loss, output in pairs)


def _wants_probabilities(loss: Any) -> bool:
    made = keras.losses.get(loss) if isinstance(loss, str) else loss
    name = getattr(made, "__name__", type(made).__name__).replace("_", "").lower()
    logits = isinstance(made, keras.losses.Loss) and made.get_config().get("from_logits")
    return name.endswith("crossentropy") and not logits


def _leaves_0_to_1(output: Any) -> bool:
    numbers = as_float64(output)
    return bool(np.any((numbers < -SLACK) | (numbers > 1 + SLACK)))
