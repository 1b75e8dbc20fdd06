"""Errors: one tree, one shape of message, and parts that reach another process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import truenorm as tn
from truenorm._checks import check_integer

pytestmark = pytest.mark.any_backend
PARTS = {"where": "a/b", "expected": "x", "received": "y", "remedy": "do z"}


def tree(base: type[tn.TruenormError] = tn.TruenormError) -> list[type[tn.TruenormError]]:
    return [base, *(error for child in base.__subclasses__() for error in tree(child))]


def through_pickle(error: Any) -> Any:
    return pickle.loads(pickle.dumps(error))  # noqa: S301


def test_the_whole_tree_is_public() -> None:
    assert {kind.__name__ for kind in tree()} == {n for n in tn.__all__ if n.endswith("Error")}


def test_a_message_says_all_parts() -> None:
    error = tn.ModelError("It is bad", **PARTS)
    assert str(error) == "It is bad (at 'a/b'). Expected: x. Received: y. Remedy: do z."
    assert str(tn.ModelError("It is bad")) == "It is bad."
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("again", [through_pickle, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("parts", [PARTS, {"remedy": "do z"}, {}], ids=["all", "one", "none"])
@pytest.mark.parametrize("kind", tree())
def test_an_error_keeps_its_parts(
    kind: type[tn.TruenormError], parts: dict[str, str], again: Callable[[Any], Any]
) -> None:
    error = kind("It is bad", **parts)
    error.add_note("while reading")
    error = again(again(error))
    assert type(error) is kind
    assert str(error) == str(kind("It is bad", **parts))
    assert error.args == kind("It is bad", **parts).args
    assert error.problem == "It is bad"
    for name in PARTS:
        assert getattr(error, name) == parts.get(name)
    assert error.__notes__ == ["while reading"]


def test_an_error_with_a_cause_that_cannot_travel_does() -> None:
    class Local(Exception):  # noqa: N818
        """Known in this function only."""

    with pytest.raises(tn.DataError) as caught:
        raise tn.DataError("It is bad", where="a/b") from Local(lambda: None)
    assert isinstance(caught.value.__cause__, Local)
    assert through_pickle(caught.value).where == "a/b"
    with pytest.raises(tn.StudyError) as outer:
        raise tn.StudyError("A trial failed") from through_pickle(caught.value)
    assert isinstance(outer.value.__cause__, tn.DataError)


@pytest.mark.parametrize("value", [True, 0, -1, 1.0, "3", None, np.float32(2), np.array([1])])
def test_what_is_no_positive_integer_is_refused(value: Any) -> None:
    with pytest.raises(tn.OptionError) as caught:
        check_integer("batch_size", value)
    assert str(caught.value) == f"batch_size must be a positive integer. Received: {value!r}."


def test_integers_of_numpy_are_integers() -> None:
    assert type(check_integer("batch_size", np.int64(3))) is int
    assert check_integer("after_epoch", 0, least=0) == 0
