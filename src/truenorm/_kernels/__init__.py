"""Training-mode batch normalization: one contract, and the kernel of the backend in use.

A kernel is a function ``normalize`` with exactly the signature of :func:`normalize` in
``_composite.py``:

* ``x``: values, floating point, any rank from 2, any size (0 included).
* ``gamma``, ``beta``: scale and offset per channel, shape ``(channels,)``, or None.
* ``axis``: which axis holds the channels; all the others are reduced.
* ``epsilon``: added to the variance, in units of ``x`` squared.
* ``mask``: booleans in the shape of ``x`` without its channel axis (axes of size 1 stretch), or
  None. False: the value does not count in the statistics. It is normalised all the same.
* ``moving``: a layer's moving statistics (:class:`Moving`), or None. They normalise if the mask
  leaves no value; and a kernel to which it costs nothing moves them (``Normalized.moved``).
* ``relu``: whether negative outputs become 0, in the same pass where the backend can.

It returns :class:`Normalized`. It computes in float32 at least; its output differentiates through
the statistics, right to the second order at least, with respect to ``x``, ``gamma`` and ``beta``.

Two more have the same signature: ``normalize_synchronized``, whose statistics are of the batches of
all replicas of a distributed run together, and ``normalize_ghosts`` (``_ghosts.py``), which takes
the ``size`` of a ghost batch besides.

``infer`` normalises with statistics that are given, in inference mode, where a backend can do so
faster than by Keras's operations, and returns None if not this time; it is None on other backends.

``isfinite``, ``where`` and ``blend`` are Keras's operations, or on PyTorch its own, since there all
that Keras converts and checks for such small ones is done at each step.

Only the files named after a framework import one, and only that of the backend in use is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from truenorm._kernels.contract import Moving, Normalized, statistics_dtype
from truenorm._kernels.ghosts import normalize_ghosts as _normalize_ghosts

infer: Callable[..., Any] | None = None
isfinite: Callable[..., Any] = keras.ops.isfinite
where: Callable[..., Any] = keras.ops.where


def blend(old: Any, value: Any, momentum: Any) -> Any:
    """One step of a moving average."""
    return old * momentum + value * (1.0 - momentum)


if keras.config.backend() == "jax":
    from truenorm._kernels.jax.kernel import normalize, normalize_synchronized
elif keras.config.backend() == "tensorflow":
    from truenorm._kernels.tensorflow.kernel import normalize, normalize_synchronized
elif keras.config.backend() == "torch":
    from truenorm._kernels.torch.kernel import blend, infer, normalize, normalize_synchronized
else:
    from truenorm._kernels.composite import normalize

    normalize_synchronized = normalize

# XLA does better with all ghost batches at once, and JAX has nothing else.
normalize_ghosts = partial(
    _normalize_ghosts, each=None if keras.config.backend() == "jax" else normalize
)

__all__ = [
    "Moving",
    "Normalized",
    "blend",
    "infer",
    "isfinite",
    "normalize",
    "normalize_ghosts",
    "normalize_synchronized",
    "statistics_dtype",
    "where",
]
