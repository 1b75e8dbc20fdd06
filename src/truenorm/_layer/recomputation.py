r"""Recomputed forward passes (gradient checkpointing): variables change once, not twice.

To save memory, activations are dropped and computed again when the backward pass needs them
(``keras.remat``, ``torch.utils.checkpoint``, ``tf.recompute_grad``, ``jax.checkpoint``). Where the
framework runs the Python function again, whatever that function assigns is assigned twice: the
moving statistics take two steps, :math:`\alpha^2` in the place of :math:`\alpha`. Where it repeats
the operations of a program, what was assigned inside cannot leave the program.

:func:`remat` does neither. It gives the function the values that its variables had, each time that
it runs, and hands what it assigns to them out as results, which are assigned once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras

from truenorm._errors import ModelError
from truenorm._keras_internals import in_stateless_scope, stateless_scope
from truenorm._kernels import Tensor, Variable, run_time

ops: Any = keras.ops

Function = Callable[..., Any]


def remat(function: Function) -> Function:
    """As ``keras.remat``, for functions that change variables: they change once.

    The function is run again in the backward pass, with the same numbers: variables that do not
    learn (moving statistics, those of batch renormalization, states of random numbers) have the
    values that they had when it ran first, and what it assigns is assigned once, after it ran
    first. So it may hold any layer, truenorm's and others, on every backend.

    truenorm's BatchNormalization needs it where a function is recomputed on JAX; on PyTorch and
    TensorFlow it knows a repeated pass by itself, but only in here does that see what was then: the
    statistics that ``renorm=True`` corrects toward, and the domain of a :func:`truenorm.domain`
    that has ended. Under ``keras.RematScope`` the layer uses it itself.

    Args:
        function: Called with tensors, and whatever else, anywhere in its arguments; gives tensors
            in any structure that ``keras.tree`` knows.

    Returns:
        A function of the same arguments and results.

    Raises:
        ModelError: When the function is called, and something in it calls ``add_loss``.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import truenorm as tn
        >>> layers = [keras.layers.Dense(4), tn.BatchNormalization(momentum=0.5)]
        >>> def block(x):
        ...     for layer in layers:
        ...         x = layer(x, training=True) if layer is layers[1] else layer(x)
        ...     return x
        >>> tn.remat(block)(np.ones((8, 3), "float32")).shape == (8, 4)
        True

    Reference:
        T. Chen, B. Xu, C. Zhang and C. Guestrin, "Training Deep Nets with Sublinear Memory Cost",
        2016, https://arxiv.org/abs/1604.06174.

    Where frameworks differ:
        ``keras.remat`` of a function that assigns to variables assigns twice on PyTorch and
        TensorFlow, and on JAX fails, since its values may not leave the function.
    """
    return repeatable(function, keras.remat)


def is_repeated() -> bool:
    """Whether what is assigned now was assigned before, by the same call of a function.

    In a stateless scope nothing is: what is noted there is a result, the same in each run.
    """
    return run_time.repeats() and not in_stateless_scope()


def repeatable(function: Function, wrap: Callable[[Function], Function]) -> Function:
    """The function inside a wrapper that may run it again, or makes a program of it."""

    @wraps(function)
    def repeated(*args: Any, **kwargs: Any) -> Any:
        given = keras.tree.flatten((args, kwargs))
        tensors = [leaf for leaf in given if ops.is_tensor(leaf)]
        before: dict[int, Tensor | None] = {}
        made: dict[str, Any] = {}

        def pure(*tensors: Tensor) -> list[Tensor]:
            """The results, and the new values of variables."""
            others = iter(tensors)
            leaves = [next(others) if ops.is_tensor(leaf) else leaf for leaf in given]
            args_now, kwargs_now = keras.tree.pack_sequence_as((args, kwargs), leaves)
            with _Repeatable(before) as scope:
                output = function(*args_now, **kwargs_now)
            results = keras.tree.flatten(output)
            made["like"] = keras.tree.pack_sequence_as(output, [0] * len(results))
            made["changed"] = scope.changed
            return [*results, *(scope.state_mapping[id(variable)] for variable in scope.changed)]

        found = list(wrap(pure)(*tensors))
        # Made by the first run, and read before the next.
        like, changed = made["like"], made["changed"]
        results = len(found) - len(changed)
        if not is_repeated():
            for variable, value in zip(changed, found[results:], strict=True):
                variable.assign(value)
        return keras.tree.pack_sequence_as(like, found[:results])

    return repeated


class _Repeatable(keras.StatelessScope):
    """Variables have the values that they had when a function ran first; changes are noted."""

    def __init__(self, before: dict[int, Tensor | None]) -> None:
        self.outer: Any = stateless_scope()
        super().__init__(collect_losses=True)  # Or Keras would drop them in silence.
        self.changed: list[Variable] = []
        self._before = before

    def add_loss(self, loss: Tensor) -> None:
        del loss
        raise ModelError(
            "What a recomputed function adds to the loss cannot leave it",
            expected="a function that gives all it computes as results",
            received="a call of add_loss",
            remedy="return it, and add it to the loss outside",
        )

    def add_update(self, update: tuple[Variable, Tensor]) -> None:
        if id(update[0]) not in self.state_mapping:
            self.changed.append(update[0])
        super().add_update(update)

    def get_current_value(self, variable: Variable) -> Tensor | None:
        """What it was; None, the variable's own value, for weights that learn."""
        key = id(variable)
        if key in self.state_mapping:
            return self.state_mapping[key]
        if key not in self._before:
            self._before[key] = (
                None if self.outer is None else self.outer.get_current_value(variable)
            )
            if self._before[key] is None and not variable.trainable:
                self._before[key] = ops.copy(variable.value)  # PyTorch's change in place.
        return self._before[key]
