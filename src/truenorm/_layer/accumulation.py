r"""Several batches that count as one: the moments of k micro-batches, and then one step.

Of the micro-batches so far there are :math:`n` values with mean :math:`\mu` and variance
:math:`\sigma^2`. The next has :math:`m` values with :math:`\mu_+` and :math:`\sigma_+^2`, and so a
share :math:`s = m / (n + m)` of both together, whose moments are (law of total variance)

.. math:: \mu \leftarrow \mu + s (\mu_+ - \mu), \qquad
          \sigma^2 \leftarrow \sigma^2 + s (\sigma_+^2 - \sigma^2)
                              + s (1 - s) (\mu_+ - \mu)^2 .

After k calls these are the moments of the union, however unlike the counts (masks, a last batch),
and the moving statistics take the step that one batch of all these values would make them take.

Of ghost batches the statistics to remember are the average, in a batch as in a union of batches:
there the last term is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from truenorm._kernels import Normalized, Tensor, Variable, isfinite, where

ops: Any = keras.ops

ROWS = ("calls", "batches", "count", "mean", "variance")
"""What is gathered, each of it per channel."""


@dataclass(frozen=True)
class Accumulation:
    """What a layer has gathered since its last step.

    Args:
        gathered: The variable that holds it, shape ``(5, channels)``: see :data:`ROWS`.
        steps: How many calls make a step.
        ghosts: Whether batches are ghost batches.
    """

    gathered: Variable
    steps: int
    ghosts: bool

    def add(self, batch: Normalized) -> Normalized:
        """The union with this batch when it is complete; until then, a batch of no values.

        A channel of a micro-batch that is not finite does not count, nor does one without values.
        """
        old = self.gathered.value
        calls, batches, count, mean, variance = ops.unstack(old, 5)
        more, its_mean, its_variance = (
            ops.cast(value, old.dtype) + ops.zeros_like(count)
            for value in (batch.count, batch.mean, batch.variance)
        )
        enters = isfinite(its_mean + its_variance) & (more > 0)
        more = where(enters, more, 0.0)
        share = more / where(enters, count + more, 1.0)
        apart = where(enters, its_mean - mean, 0.0)
        wider = where(enters, its_variance - variance, 0.0)
        between = 0.0 if self.ghosts else share * (1.0 - share) * ops.square(apart)
        union = (
            calls + 1.0,
            batches + where(enters, ops.cast(batch.batches, old.dtype), 0.0),
            count + more,
            mean + share * apart,
            variance + share * wider + between,
        )
        return self._let_go(batch.output, union, calls + 1.0 >= self.steps)

    def end(self) -> Normalized:
        """The union of what there is, complete or not."""
        gathered = ops.unstack(ops.copy(self.gathered.value), 5)  # PyTorch's changes in place.
        return self._let_go(None, gathered, gathered[0] > 0)

    def _let_go(self, output: Tensor, union: Any, complete: Tensor) -> Normalized:
        self.gathered.assign(where(complete, 0.0, ops.stack(union)))
        _, batches, count, mean, variance = union
        count = where(complete, count, 0.0)
        return Normalized(output, mean, variance, count, batches if self.ghosts else 1)
