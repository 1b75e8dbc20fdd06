"""What a study compares: versions of one model, each with its own settings of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import keras

from truenorm._checks import is_number, known_options
from truenorm._errors import ModelError, OptionError
from truenorm._keras_internals import layers_in
from truenorm._layer.arguments import FreezePolicy, check_policy
from truenorm._model.graph import is_batch_normalization
from truenorm._model.trainer import compile_like
from truenorm._modes.freeze import freeze
from truenorm._rewrites.place import Position, place
from truenorm._study.conversions import conversion_of

Change = str | Callable[[Any], Any] | None
"""A position or conversion, a function from model to model, or None: the model as it was built."""


@dataclass(frozen=True)
class Variant:
    """One version of the model in a study, and the settings that go with it.

    Args:
        change: A position (see :func:`truenorm.place`); what :func:`truenorm.replace` puts in the
            place of each BatchNormalization: ``group`` (``group:16`` with 16 groups), ``layer``,
            ``affine``, ``truenorm``, ``keras``; or a function that takes the compiled model and
            returns the one to train (a new model, or the same one changed); one that is not
            compiled is compiled as the first. None: the model as it was built.
        learning_rate: The optimizer's learning rate; None leaves it.
        batch_size: Samples per step; None takes the study's. Where the data is a function, it must
            take a ``batch_size``.
        momentum: Momentum of every BatchNormalization's moving statistics; None leaves it.
        freeze: What BatchNormalization does not learn: see :func:`truenorm.freeze`.

    Example:
        >>> import truenorm as tn
        >>> variants = {
        ...     "stock": None,
        ...     "after": "after_activation",
        ...     "small batches": tn.Variant(batch_size=8, learning_rate=3e-4),
        ...     "small batches, slow average": tn.Variant(batch_size=8, momentum=0.999),
        ... }
    """

    change: Change = None
    learning_rate: float | None = None
    batch_size: int | None = None
    momentum: float | None = None
    freeze: FreezePolicy | None = None

    def __post_init__(self) -> None:
        if not (self.change is None or isinstance(self.change, str) or callable(self.change)):
            raise OptionError(
                "This is not a change of a model",
                where="change",
                expected="a position or conversion, a function from model to model, or None",
                received=repr(self.change),
            )
        rate, momentum, size = self.learning_rate, self.momentum, self.batch_size
        if rate is not None and not (is_number(rate) and rate > 0):
            raise _bad("learning_rate", "a number above 0, or None", rate)
        if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
            raise _bad("momentum", "a number from 0 to 1, or None", momentum)
        if size is not None and (type(size) is not int or size < 1):
            raise _bad("batch_size", "an integer of 1 or more, or None", size)
        if self.freeze is not None:
            check_policy(self.freeze)

    def applied(self, model: Any) -> Any:
        """The model to train, made from the compiled model of a seed."""
        new = self._changed(model)
        if not new.compiled:
            compile_like(model, new)
        layers = [layer for layer in layers_in(new) if is_batch_normalization(layer)]
        if self.momentum is not None:
            for layer in layers:
                layer.momentum = self.momentum
        if self.learning_rate is not None:
            new.optimizer.learning_rate = self.learning_rate
        if self.freeze is not None:
            freeze(new, self.freeze)
        return new

    def _changed(self, model: Any) -> Any:
        if self.change is None:
            return model
        if isinstance(self.change, str):
            conversion = conversion_of(self.change)
            if conversion is not None:
                return conversion.of(model).model
            return place(model, cast(Position, self.change)).model
        new = self.change(model)
        if not isinstance(new, keras.Model):
            raise ModelError(
                "The function of a variant did not return a model",
                where="variants",
                expected="a keras.Model",
                received=type(new).__name__,
                remedy="return the model to train, as in lambda m: tn.replace(m, 'keras').model",
            )
        return new

    def settings(self) -> dict[str, Any]:
        """What JSON can say of it; a function by its name, its code is compared elsewhere."""
        name = getattr(self.change, "__name__", None) or type(self.change).__name__
        change = name if callable(self.change) else self.change
        said = {
            "change": change,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "momentum": self.momentum,
            "freeze": self.freeze,
        }
        return {key: value for key, value in said.items() if value is not None}


Variant.__init__ = known_options(Variant.__init__)

Variants = Sequence[str] | Mapping[str, "str | Variant | Callable[[Any], Any] | None"]


def variants_of(variants: Variants) -> dict[str, Variant]:
    """The variants by name; positions and conversions stand for themselves.

    Raises:
        OptionError: There are fewer than two, or one is no variant.
    """
    if isinstance(variants, Mapping):
        named = {
            name: value if isinstance(value, Variant) else Variant(value)
            for name, value in variants.items()
        }
    else:
        given = () if isinstance(variants, str) else tuple(variants)
        named = {name: Variant(name) for name in given}
        if len(named) < len(given):
            named = {}
    if len(named) < 2:
        raise OptionError(
            "A study compares two or more variants",
            where="variants",
            expected="a sequence of different positions or conversions, or a mapping from names to "
            "variants",
            received=repr(variants),
            remedy="for example ('before_activation', 'after_activation')",
        )
    for name in named:
        if type(name) is not str or not name.strip() or not name.isprintable():
            raise OptionError(
                "The name of a variant is not usable",
                where="variants",
                expected="printable text",
                received=repr(name),
            )
    return named


def names_in(variants: Mapping[str, Variant]) -> tuple[list[str], list[str]]:
    """Positions and conversions among the changes; what is neither is for ``place`` to refuse."""
    names = [v.change for v in variants.values() if isinstance(v.change, str)]
    conversions = [name for name in names if conversion_of(name) is not None]
    return [name for name in names if name not in conversions], conversions


def is_positions(variants: Mapping[str, Variant]) -> bool:
    """Whether every variant is a position under its own name, without settings."""
    return all(v == replace(Variant(name)) for name, v in variants.items()) and set(
        variants
    ) <= set(get_args(Position))


def _bad(name: str, expected: str, received: Any) -> OptionError:
    return OptionError(
        "A variant has an impossible setting",
        where=name,
        expected=expected,
        received=repr(received),
    )
