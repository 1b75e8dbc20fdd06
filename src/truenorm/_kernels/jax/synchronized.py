r"""JAX: one batch whose parts are on the devices of a mapped program; one collective each way.

Inside ``jax.pmap`` and ``jax.shard_map`` a program sees the part of one device, and names the axes
of devices in its collectives. (Under ``jax.jit`` a program sees the whole batch.) Forward each
device gathers count, mean and variance of all parts, and merges them (``composite.merged``).
The derivative of what is merged is a sum over the parts, with
:math:`o_r = (s_r - s) + \delta_r - \delta` and the weights :math:`w_r = n_r / n`:

.. math:: \dot\delta = \sum_r w_r \dot\delta_r, \qquad
          \dot{\sigma^2} = \sum_r w_r \bigl( \dot{\sigma_r^2} + 2 o_r \dot\delta_r \bigr) ,

so that backward two numbers per channel are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from truenorm._errors import DistributedError
from truenorm._kernels import composite
from truenorm._kernels.contract import Scalar, Tensor, Vector

Axes = tuple[str, ...]
"""Names of axes of devices."""


def mapped() -> Axes:
    """The axes over which the program that is traced is one of several."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def axes(over: Sequence[str] | None) -> Axes:
    """Those over which a batch goes together here; none where it is not divided by name.

    Args:
        over: The names that were asked for; None: the one axis that there is.

    Raises:
        DistributedError: An axis that was asked for is not there, or there are several to choose
            from.
    """
    here = mapped()
    if over is None:
        if len(here) > 1:
            raise DistributedError(
                "The program of synchronized BatchNormalization is mapped over several axes",
                expected="the names of those that the batch is divided over",
                received=f"synchronized=True, and the axes {', '.join(map(repr, here))}",
                remedy=f"synchronized={here[0]!r}, or several: synchronized={here!r}",
            )
        return here
    bound = tuple(name for name in over if _is_bound(name))
    known = {*bound, *jax.sharding.get_abstract_mesh().axis_names}
    if here and not known.issuperset(over):
        raise DistributedError(
            "Synchronized BatchNormalization is told of an axis that there is not",
            expected=f"names among {', '.join(map(repr, here))}",
            received=f"synchronized={over!r}",
        )
    return bound


def _is_bound(name: str) -> bool:
    """Whether collectives can name it; over an axis that XLA divides a batch is whole."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def parts(over: Axes) -> int:
    """How many devices have a part."""
    return jax.lax.axis_size(over) if over else 1


def total(over: Axes, *values: Tensor) -> Tensor:
    """The sums over all devices."""
    return jax.lax.psum(jnp.stack(values), over)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def merged(
    over: Axes, count: Scalar | Vector, shift: Vector, delta: Vector, variance: Vector
) -> tuple[Tensor, ...]:
    """Count, shift, delta and variance of all parts, from those of one."""
    return composite.merged(count, shift, delta, variance, partial(_known_to_be_same, over))


@merged.defjvp
def _moving_parts(over: Axes, at: Any, moving: Any) -> Any:
    count, shift, delta, _ = at
    _, _, of_mean, of_variance = moving
    whole = merged(over, *at)
    weight = count / jnp.maximum(whole[0], 1.0)
    apart = (shift - whole[1]) + delta - whole[2]
    change = total(over, weight * of_mean, weight * (of_variance + 2 * apart * of_mean))
    return whole, (jnp.zeros_like(whole[0]), jnp.zeros_like(whole[1]), *change)


def _known_to_be_same(over: Axes, vector: Vector) -> Tensor:
    """As :func:`gathered`; half the traffic, but not to be differentiated."""
    try:
        return jax.lax.all_gather(vector, over, to="invarying")
    except ValueError:  # over an axis of jax.vmap
        return gathered(over, vector)


def gathered(over: Axes, vector: Vector) -> Tensor:
    """The vectors of all devices, one per row; differentiable."""
    own = jnp.arange(parts(over))[:, None] == jax.lax.axis_index(over)
    return jax.lax.psum(jnp.where(own, vector, 0), over)


def alike(*arrays: Tensor | None) -> list[Any]:
    """The arrays, each varying over all axes of devices that one of them varies over.

    Where ``jax.shard_map`` checks that, the gradients that a rule gives have to vary as do the
    arrays; those of what is the same on all devices JAX then adds up.
    """
    everywhere = frozenset[str]().union(*(_varying(a) for a in arrays if a is not None))
    return [
        array
        if array is None or everywhere <= _varying(array)
        else jax.lax.pcast(array, tuple(everywhere - _varying(array)), to="varying")
        for array in arrays
    ]


def _varying(array: Tensor) -> frozenset[str]:
    kind = getattr(jax.typeof(array), "mat", None)
    return getattr(kind, "varying", frozenset[str]())
