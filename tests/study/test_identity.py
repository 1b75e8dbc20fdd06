"""What tells one study from another: the code of its functions, and the values that they hold."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from truenorm._study.identity import code_digest

pytestmark = pytest.mark.any_backend


def adder(amount: int, word: str = "a") -> Callable[[int], int]:
    return lambda x: x + amount + len(word)


def helper() -> int:
    return 1


def calls_helper() -> int:
    return helper()


class Own(keras.Model):
    def call(self, inputs: Any) -> Any:
        return inputs


def test_code_is_known_again_and_changes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_digest(adder(1)) == code_digest(adder(1))
    assert code_digest(adder(1)) != code_digest(adder(2))
    assert code_digest(adder(1, "b")) != code_digest(adder(1))
    before = code_digest(calls_helper)
    assert before == code_digest(calls_helper)
    monkeypatch.setitem(calls_helper.__globals__, "helper", lambda: 2)
    assert code_digest(calls_helper) != before
    assert code_digest(Own) == code_digest(Own)
    assert code_digest(np.arange(3)) != code_digest(np.arange(4))


class Sized:
    sizes = (8, 16)

    @property
    def first(self) -> int:
        return self.sizes[0]


class Wider:
    sizes = (8, 32)

    @property
    def first(self) -> int:
        return self.sizes[0]


class Second:
    sizes = (8, 16)

    @property
    def first(self) -> int:
        return self.sizes[1]


for _one in (Wider, Second):
    _one.__name__ = _one.__qualname__ = "Sized"


def _with(attribute: Any) -> Any:
    """A class with this in it."""
    return type("Made", (), {"__module__": __name__, "attribute": attribute})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(adder, 1), partial(adder, 2)),
        (partial(adder, word="a"), partial(adder, word="b")),
        (lambda: [k + 5 for k in (1, 2)], lambda: [k + 6 for k in (1, 2)]),
        (lambda: sum(k * 5 for k in (1, 2)), lambda: sum(k * 6 for k in (1, 2))),
        (lambda: dict.fromkeys((1, 2), "a"), lambda: dict.fromkeys((1, 2), "b")),
        (np.float32(0.1), np.float32(0.2)),
        (np.int64(8), np.int64(16)),
        (keras.ops.ones(3), keras.ops.zeros(3)),
        (np.array(["a", None]), np.array(["b", None])),
        (range(3), range(4)),
        (slice(1), slice(2)),
        (Path("a"), Path("b")),
        (deque([1]), deque([2])),
        (math.sqrt, math.cos),
        (math, os),
        (Sized, Wider),
        (Sized, Second),
        (_with(cached_property(lambda _: 1)), _with(cached_property(lambda _: 2))),
        (_with(cache(lambda _: 1)), _with(cache(lambda _: 2))),
        (_with(staticmethod(lambda: 1)), _with(staticmethod(lambda: 2))),
        (_with(Sized), _with(Wider)),
        (re.compile("a"), re.compile("b")),
        ([x := [1], y := [2], x], [x, y, y]),
        ([[1], 2], [[1, 2]]),
    ],
)
def test_another_value_is_another_study(one: Any, other: Any) -> None:
    def closing(over: Any) -> Callable[[], Any]:
        return lambda: over

    assert code_digest(closing(one)) == code_digest(closing(one))
    assert code_digest(closing(one)) != code_digest(closing(other))


def test_a_docstring_is_no_other_study() -> None:
    def said() -> str:
        """Some words."""
        return "a"

    before = code_digest(said)
    said.__code__ = said.__code__.replace(co_consts=("Other words.", *said.__code__.co_consts[1:]))
    assert code_digest(said) == before
