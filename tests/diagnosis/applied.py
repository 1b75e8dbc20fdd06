"""Remedies that diagnose prints, applied to a model as a reader of them would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

import truenorm as tn

L = keras.layers


@dataclass
class Fault:
    """A model with a fault.

    Args:
        code: Of the rule that finds it.
        build: Makes the model.
        remedy: What the finding says.
        advised: Where that is no call: makes the model as advised.
        data: What it is diagnosed with.
        options: Of the diagnosis.
    """

    code: str
    build: Callable[[], Any]
    remedy: str
    advised: Callable[[], Any] | None = None
    data: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def found(fault: Fault, model: Any) -> dict[str, str]:
    """The remedy by the site; nothing where there is no BatchNormalization any more."""
    if not any(isinstance(k, L.BatchNormalization) for k in model._flatten_layers()):
        return {}
    diagnosis = tn.diagnose(model, fault.data, select=fault.code, **fault.options)
    assert diagnosis.checked == (fault.code,)
    return {finding.site: finding.remedy for finding in diagnosis.findings}


def apply(remedy: str, model: Any, data: Any, y: Any = None) -> Any:
    """Make the calls as they are printed; gives the model that they leave."""
    names = {"tn": tn, "keras": keras, "model": model, "data": data, "y": y}
    exec(remedy, names)  # noqa: S102
    return names["model"]


def outputs(model: Any, x: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(model(x, training=False)))


GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(3.0, 2.0, (256, 4)).astype("float32")
Y = (np.tanh(X[:, :1] - 3) + 0.5 * X[:, 1:2]).astype("float32")


class Forgetful(keras.Model):
    """Its ``call`` takes no ``training``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = L.Dense(16, activation="tanh"), L.Dense(1)
        self.bn = L.BatchNormalization(name="bn")

    def call(self, x: Any) -> Any:
        return self.last(self.bn(self.first(x), training=None))


def small(batch_norm: Any = None) -> Any:
    layer = batch_norm or L.BatchNormalization(name="bn")
    return keras.Sequential([keras.Input((4,)), layer, L.Dense(1)])
