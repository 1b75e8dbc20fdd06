r"""Several domains in one layer: each has statistics of its own, and gamma and beta if so chosen.

Clean images and adversarial examples (Xie et al., 2020, "Adversarial Examples Improve Image
Recognition", arXiv:1911.09665), real and generated ones, data of several sources (Chang et al.,
2019, "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation", arXiv:1906.03950):
one mean and one variance are right for none of them.

Sample i of domain :math:`d_i` is normalised with the moments of the samples of its domain in the
batch, or in inference mode with the moving statistics of that domain:

.. math:: y_i = \gamma_{d_i} \frac{x_i - \mu_{d_i}}{\sqrt{\sigma_{d_i}^2 + \epsilon}}
                + \beta_{d_i} .

All of a layer's weights that are per domain have a row for each. A number that is no domain gives
NaN where a compiled program finds it, since that cannot raise, and moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from truenorm._checks import check_integer
from truenorm._errors import DataError, OptionError
from truenorm._keras_internals import in_stateless_scope
from truenorm._kernels import Tensor, Variable, Vector, replicas, run_time, statistics_dtype

ops: Any = keras.ops

STATISTICS = (
    "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev",
    "batches_seen", "gathered",
)  # fmt: skip

_entered: list[int] = []
"""The domains of the contexts that are open, the innermost last."""


_current: dict[Any, Variable] = {}
"""Those of :func:`current`, by strategy. (In a cache ``torch.compile`` would not find them.)"""


def prepare() -> None:
    """Make the variable of this strategy: while a program is traced it could not be made.

    Each strategy has one of its own, with a part for each replica: replicas are traced in turns,
    and of a part that they shared each would put back what another one had set.
    """
    where = replicas.strategy()
    if where not in _current:
        now = float(_entered[-1]) if _entered else 0.0
        with run_time.constants():
            made = keras.Variable(now, trainable=False, dtype="float32", name="domain")
        _current[where] = made


def current() -> Variable:
    """The domain of the calls that name none: one variable for all layers of a strategy.

    As a variable it is read by compiled programs each time that they run. It is a float, because
    TensorFlow keeps the variables that are integers away from the device.
    """
    if not _current:
        prepare()
    where = replicas.strategy()
    return _current[where] if where in _current else next(iter(_current.values()))


@contextmanager
def domain(index: int) -> Generator[None]:
    """Whatever runs inside is of one domain, in all layers that have several.

    Around a call, around ``fit``, ``evaluate``, ``predict`` and the like, compiled before or not,
    and inside a ``train_step``, traced or not: compiled programs read which domain it is when they
    run. Outside of all such contexts it is domain 0. A layer that is given its ``domain=`` in the
    call takes that one.

    Args:
        index: The domain, from 0.

    Raises:
        OptionError: It is no integer of 0 or more; or, when a layer is called inside, it is not
            less than that layer's number of domains.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import truenorm as tn
        >>> layer = tn.BatchNormalization(domains=2, momentum=0.0)
        >>> x = np.arange(4, dtype="float32")[:, None]
        >>> _ = layer(x, training=True)
        >>> with tn.domain(1):
        ...     _ = layer(x + 10, training=True)
        >>> keras.ops.convert_to_numpy(layer.moving_mean).ravel().tolist()
        [1.5, 11.5]

    Where frameworks differ:
        ``jax.jit`` of a function that calls a layer as it is (not by ``stateless_call``, as ``fit``
        does) holds all variables as they are when it is traced, and so the domain.
    """
    check_integer("domain", index, least=0)
    outside = run_time.constants if run_time.is_now() else nullcontext
    with outside():
        variables = _of_here()
        before = [ops.copy(variable.value) for variable in variables]  # PyTorch's changes in place.
    with run_time.constants():
        value = ops.convert_to_tensor(float(index), dtype="float32")
    with outside():
        for variable in variables:
            variable.assign(value)
    _entered.append(index)
    try:
        yield
    finally:
        _entered.pop()
        with outside():
            variables = _of_here()
            before += before[:1] * (len(variables) - len(before))  # Some were made inside.
            for variable, old in zip(variables, before, strict=True):
                variable.assign(old)


def _of_here() -> list[Variable]:
    """The variables that a context sets: in a replica its strategy's, elsewhere those of all."""
    own = current()
    return [own] if replicas.in_replica() else [*_current.values()]


@dataclass(frozen=True)
class Row:
    """The row of a variable for one domain, as a variable."""

    rows: Variable
    index: Any

    @property
    def value(self) -> Tensor:
        """NaN where there is no such row."""
        if isinstance(self.index, int):
            return ops.copy(self.rows.value[self.index])  # PyTorch's change in place.
        count = self.rows.shape[0]
        row = ops.take(self.rows.value, ops.clip(self.index, 0, count - 1), axis=0)
        return ops.where((self.index >= 0) & (self.index < count), row, np.nan)

    def assign(self, value: Tensor) -> None:
        """The other rows stay."""
        rows = self.rows.value
        own = ops.arange(rows.shape[0], dtype="int32") == self.index
        own = ops.reshape(own, [-1, *[1] * (len(rows.shape) - 1)])
        self.rows.assign(ops.where(own, ops.cast(value, rows.dtype), rows))


def state(layer: Any) -> list[Variable]:
    """What a layer's program reads besides its weights; only on JAX that has to be handed to it."""
    several = getattr(layer, "domains", None) is not None
    return [current()] if several and keras.config.backend() == "jax" else []


def has_rows(layer: Any, name: str | None) -> bool:
    """Whether a weight of a layer with domains has a row for each."""
    return name in STATISTICS or (layer.domain_affine and name in ("gamma", "beta"))


class Weights:
    """A layer's weights as those of one domain: what has a row for each is that row."""

    def __init__(self, layer: Any, index: Any) -> None:
        self._layer, self.index = layer, index

    def __getattr__(self, name: str) -> Any:
        weight = getattr(self._layer, name)
        rows = weight is not None and has_rows(self._layer, name)
        return Row(weight, self.index) if rows else weight


def all_weights(layer: Any) -> list[Any]:
    """What holds a layer's weights: itself, or the weights of each of its domains."""
    return [layer] if layer.domains is None else [Weights(layer, n) for n in range(layer.domains)]


def chosen(layer: Any, given: Any) -> Any:
    """The domain of a call: a number, a tensor of one, or a tensor of one for each sample.

    Raises:
        OptionError: It is none of the layer's.
        DataError: It is not one number, nor one for each sample.
    """
    if given is None:
        _check(layer, [*_entered[-1:]])
        # PyTorch may be in a mode that takes no tensor made outside of it. (In a stateless scope
        # the variable may have the value of an earlier run: see recomputation.py.)
        if run_time.is_now() and not in_stateless_scope():
            return _entered[-1] if _entered else 0
        return ops.cast(current().value, "int32")
    if isinstance(given, (int, np.integer)) and not isinstance(given, bool):
        _check(layer, [int(given)])
        return int(given)
    given = ops.convert_to_tensor(given)
    if len(given.shape) > 1 and any(size != 1 for size in given.shape[1:]):
        raise DataError(
            "The domain of BatchNormalization is one number, or one for each sample",
            where=layer.path,
            expected="shape () or (samples,)",
            received=f"shape {tuple(given.shape)}",
        )
    numbers = run_time.numbers(given)
    if numbers is not None:
        _check(layer, np.ravel(numbers).tolist())
    index = ops.cast(given, "int32")
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(given.dtype)):
        index = ops.where(ops.cast(index, given.dtype) == given, index, -1)  # 0.5 is no domain
    return index if len(given.shape) == 0 else ops.reshape(index, [-1])


def _check(layer: Any, domains: list[float]) -> None:
    for index in domains:
        if index % 1 != 0 or not 0 <= index < layer.domains:
            raise OptionError(
                "BatchNormalization has no such domain",
                where=layer.path,
                expected=f"one of its {layer.domains} domains, from 0 to {layer.domains - 1}",
                received=f"domain {index:g}",
            )


def apart(
    layer: Any,
    inputs: Tensor,
    mask: Tensor | None,
    domain: Any,
    normalize: Callable[[Tensor, Tensor | None, Any], Tensor],
) -> Tensor:
    """Normalise each sample with the weights of its domain.

    Args:
        layer: The layer.
        inputs: Its input.
        mask: Booleans of the rank of the input (``masks.aligned``), or None.
        domain: What the call was given.
        normalize: From inputs, such a mask and weights to the output.
    """
    if layer.domains is None:
        raise OptionError(
            "BatchNormalization was called with a domain, and has none",
            where=layer.path,
            expected="a layer made with domains=n",
            received="domain=... in the call, domains=None",
        )
    index = chosen(layer, domain)
    if isinstance(index, int) or len(index.shape) == 0:
        return normalize(inputs, mask, Weights(layer, index))
    if hasattr(inputs, "flat_values"):
        raise DataError(
            "Samples of a ragged tensor cannot have a domain each",
            where=layer.path,
            expected="one domain for all of them",
            received="a domain for each sample",
            remedy="call the layer once for each domain, or pass x.to_tensor() and a mask",
        )
    index = ops.reshape(index, [-1, *[1] * (len(inputs.shape) - 1)])
    output: Any = None
    for each in range(layer.domains):
        own = index == each
        of_own = own if mask is None else ops.logical_and(own, mask)
        normalized = normalize(inputs, of_own, Weights(layer, each))
        output = ops.where(own, normalized, np.nan if output is None else output)
    return output


def infer(
    inputs: Tensor,
    gamma: Vector | None,
    beta: Vector | None,
    mean: Vector,
    variance: Vector,
    *,
    axis: int,
    epsilon: float,
) -> Tensor:
    """Normalise with given statistics, as Keras's layer does with its own."""
    dtype = statistics_dtype(inputs.dtype)
    scale, offset, mean, variance = (
        None if value is None else ops.cast(value, dtype) for value in (gamma, beta, mean, variance)
    )
    return ops.batch_normalization(
        ops.cast(inputs, dtype), mean, variance, axis, offset, scale, epsilon
    )
