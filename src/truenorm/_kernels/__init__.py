"""Training-mode batch normalization: one contract, and the kernel of the backend in use.

A kernel (:class:`Kernel` in ``contract.py``) normalises a batch with its own statistics, which it
returns as :class:`Normalized`. There are three:

* ``normalize``, of one batch by itself;
* ``normalize_synchronized``, whose statistics are of the batches of all replicas of a distributed
  run together; on JAX it takes names of axes of devices besides, ``over``;
* ``normalize_ghosts`` (``ghosts.py``), of parts of the batch by themselves; it takes their ``size``
  besides.

``infer`` normalises with statistics that are given, in inference mode, where a backend can do so
faster than by Keras's operations, and returns None if not this time; it is None on other backends.

``brought`` takes input and mask to the device of a weight; it is None where the framework does.

``isfinite``, ``where`` and ``blend`` are Keras's operations, or on PyTorch its own, since there all
that Keras converts and checks for such small ones is done at each step.

Only the folders named after a framework import one, and only that of the backend in use is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from truenorm._kernels import ghosts
from truenorm._kernels.contract import (
    Kernel,
    Moving,
    Normalized,
    Options,
    Scalar,
    Tensor,
    Variable,
    Vector,
    statistics_dtype,
)

normalize: Kernel
normalize_synchronized: Callable[..., Normalized]
normalize_ghosts: Callable[..., Normalized]
infer: Callable[..., Tensor | None] | None = None
brought: Callable[..., tuple[Tensor, Tensor | None]] | None = None
isfinite: Callable[[Tensor], Tensor] = keras.ops.isfinite
where: Callable[..., Tensor] = keras.ops.where


def blend(old: Vector, value: Vector, momentum: Scalar) -> Vector:
    """One step of a moving average."""
    return old * momentum + value * (1.0 - momentum)


def _without_replicas(*batch: Any, over: object = None) -> Normalized:
    del over
    return normalize(*batch)


if keras.config.backend() == "jax":
    from truenorm._kernels.jax.kernel import (
        normalize,
        normalize_ghosts,
        normalize_synchronized,
    )
elif keras.config.backend() == "tensorflow":
    from truenorm._kernels.tensorflow.kernel import (
        normalize,
        normalize_ghosts,
        normalize_synchronized,
    )
elif keras.config.backend() == "torch":
    from truenorm._kernels.torch.kernel import (
        blend,
        brought,
        infer,
        isfinite,
        normalize,
        normalize_synchronized,
        where,
    )

    normalize_ghosts = partial(ghosts.normalize_ghosts, each=normalize)
else:
    from truenorm._kernels.composite import normalize

    normalize_synchronized = _without_replicas
    normalize_ghosts = ghosts.normalize_ghosts


__all__ = [
    "Kernel",
    "Moving",
    "Normalized",
    "Options",
    "Scalar",
    "Tensor",
    "Variable",
    "Vector",
    "blend",
    "brought",
    "infer",
    "isfinite",
    "normalize",
    "normalize_ghosts",
    "normalize_synchronized",
    "statistics_dtype",
    "where",
]
