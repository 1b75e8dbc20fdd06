"""Every rewrite on random models. The oracle is the model that was given, in inference mode.

A few examples in each run of all tests; hundreds with ``make random``, thousands with
``make nightly``. A failing example is printed as a description: ``build(...)`` makes its model.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Generator
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, reject, settings
from random_descriptions import Description, descriptions
from random_models import build
from small_models import inputs_for, predict, snapshot

import truenorm as tn
from truenorm._model.graph import calls, is_batch_normalization
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import describe, site_calls
from truenorm._model.values import numbers
from truenorm._rewrites.verify import TOLERANCE

L = keras.layers
SHARDS = 4
"""Parts of equal size, for the workers to share."""
FEW = 8 if keras.config.backend() == "torch" else 4  # the others compile what they run
EXAMPLES = 500 if settings.get_current_profile_name() == "random" else FEW
POSITIONS: Any = ("none", "before_activation", "after_activation", "before_layer")


@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.filterwarnings("ignore:You are using a softmax over axis")
@pytest.mark.parametrize("shard", range(SHARDS))
@settings(
    max_examples=EXAMPLES // SHARDS,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(descriptions)
def test_every_rewrite_of_a_random_model(shard: int, description: Description) -> None:
    del shard
    model = build(description)
    x = inputs_for(model, samples=3)
    with counted_sites() as sites:
        try:
            expected = predict(model, x)
        except NotImplementedError:  # PyTorch pools no 16-bit volumes on a CPU
            reject()
    check_rebuilding(model, x, expected)
    if not sites:
        check_refusals(model)
        return
    spots = spots_of(model, sites)
    check_replacing(model, x, expected, len(sites), spots)
    check_folding(model, x, expected, len(sites))
    for position in POSITIONS:
        check_placing(model, x, position, len(sites), spots)
    check_inserting(model, x, len(sites))
    check_there_and_back(model, x, expected)


# --- what each tool promises -------------------------------------------------------------------


def check_rebuilding(model: Any, x: Any, expected: Any) -> None:
    with untouched(model):
        twin = rebuild(model)
    assert_close(predict(twin, x), expected, 0.0)
    assert_same_config(twin, model)
    assert (variables(twin), modes(twin)) == (variables(model), modes(model))


def check_refusals(model: Any) -> None:
    tools = [tn.fold, *(lambda m, p=p: tn.place(m, p) for p in POSITIONS)]
    tools += [lambda m: tn.replace(m, to="keras")]
    for tool in tools:
        with untouched(model), pytest.raises(tn.ModelError, match="has no BatchNormalization"):
            tool(model)


def check_replacing(model: Any, x: Any, expected: Any, sites: int, spots: int) -> None:
    both: Any = (("truenorm", L.BatchNormalization), ("keras", tn.BatchNormalization))
    for to, other in both:
        with untouched(model):
            rewrite = tn.replace(model, to=to)
        assert_receipt(rewrite, model, spots)
        left = {site.path for site in rewrite.left if "already" not in site.reason}
        assert not any(type(k) is other for k in layers(rewrite.model)) or left
        assert_close(made(rewrite, x, sites), expected, tolerance(model))
        assert modes(rewrite.model) == modes(model)
        if "mixed" not in str({k.dtype_policy.name for k in layers(model)}):
            assert variables(rewrite.model) == variables(model)


def check_folding(model: Any, x: Any, expected: Any, sites: int) -> None:
    with untouched(model):
        rewrite = tn.fold(model)
    assert_receipt(rewrite, model, sites)
    assert_close(made(rewrite, x, sites - len(rewrite.changed)), expected, tolerance(model))
    ours = {k.name for k in layers(rewrite.model) if type(k) is tn.BatchNormalization}
    in_training = {k.name for call in calls(model) if call.written for k in inside(call)}
    assert ours <= in_training
    event(f"folded: {len(rewrite.changed)} of {sites}")
    paths = [entry.path for entry in (*rewrite.changed, *rewrite.left)][::2]
    with untouched(model):
        some = tn.fold(model, where=lambda site: site.path in paths)
    assert_receipt(some, model, sites)
    assert_close(made(some, x, sites - len(some.changed)), expected, tolerance(model))
    assert {change.path for change in some.changed} <= set(paths)


def check_placing(model: Any, x: Any, position: Any, sites: int, spots: int) -> None:
    with untouched(model):
        rewrite = tn.place(model, position)
    assert_receipt(rewrite, model, spots)
    removed = len(rewrite.changed) if position == "none" else 0
    made(rewrite, x, sites - removed)
    lost, new = variables(model), variables(rewrite.model)
    lost, new = lost - new, new - lost
    if position == "none":
        assert {kind for _, kind, *_ in lost} <= {"BatchNormalization"}
        assert {(name, any(value)) for *_, name, value in new} <= {("bias", False)}
        assert {k.reason for k in rewrite.left} <= {
            "it has an activation of its own inside",
            "inside a layer whose call is not a graph (a wrapper or a subclass)",
        }
    else:
        assert (lost, new) == (Counter(), Counter())
        assert modes(rewrite.model) == modes(model)
    event(f"placed {position}: {len(rewrite.changed)} of {sites}")


def check_inserting(model: Any, x: Any, sites: int) -> None:
    for position in ("before_activation", "after_activation"):
        with untouched(model):
            rewrite = tn.place(model, position, insert=True)
        inserted = [change for change in rewrite.changed if "inserted" in change.what]
        assert len({change.path for change in inserted}) == len(inserted)
        made(rewrite, x, sites + len(inserted))
        assert not variables(model) - variables(rewrite.model)
        event(f"inserted: {len(inserted)}")


def check_there_and_back(model: Any, x: Any, expected: Any) -> None:
    around = ("before_activation", "after_activation")
    for here, there in (around, around[::-1]):
        if positions(model) != {here}:
            continue
        moved = tn.place(model, there)
        if moved.left:
            continue
        back = tn.place(moved.model, here)
        if back.left:
            why = {site.reason for site in back.left}
            assert all("must stay one" in k or k.startswith("already") for k in why)
            continue
        assert_same_config(back.model, model)
        assert_close(predict(back.model, x), expected, 0.0)
        event(f"there and back: {here}")


# --- how it is seen ----------------------------------------------------------------------------


def positions(model: Any) -> set[str | None]:
    return {describe(call).position for call in site_calls(model)[0]}


@contextlib.contextmanager
def untouched(model: Any) -> Generator[None]:
    before = snapshot(model)
    try:
        yield
    finally:
        assert snapshot(model) == before


@contextlib.contextmanager
def counted_sites() -> Generator[list[Any]]:
    """The BatchNormalization layers that run, once for each call."""
    found: list[Any] = []
    kinds: Any = (L.BatchNormalization, L.TimeDistributed)  # which calls its layer's own call()

    def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
        found.extend(k for k in [layer, *innermost(layer)] if isinstance(k, kinds[0]))
        return L.Layer.__call__(layer, *args, **kwargs)

    for kind in kinds:
        kind.__call__ = called
    try:
        yield found
    finally:
        for kind in kinds:
            del kind.__call__


def innermost(layer: Any) -> list[Any]:
    """What a wrapper is around."""
    return [layer.layer, *innermost(layer.layer)] if isinstance(layer, L.Wrapper) else []


def spots_of(model: Any, sites: list[Any]) -> int:
    """How many entries a receipt has: all calls of what a wrapper is around are one."""
    wrapped = {inner for layer in layers(model) for inner in innermost(layer)}
    return sum(layer not in wrapped for layer in sites) + len(wrapped & {*sites})


def inside(call: Any) -> list[Any]:
    return [call.operation, *innermost(call.operation)]


def made(rewrite: tn.Rewrite, x: Any, sites: int) -> Any:
    """The outputs of the new model, in which so many BatchNormalization run."""
    with counted_sites() as found:
        outputs = predict(rewrite.model, x)
    assert len(found) == sites
    return outputs


def assert_receipt(rewrite: tn.Rewrite, model: Any, sites: int) -> None:
    """Every site is in it, once."""
    paths = [entry.path for entry in (*rewrite.changed, *rewrite.left)]
    assert len(set(paths)) == len(paths) == sites
    assert {re.sub(r"#\d+", "", path).rpartition("/")[2] for path in paths} == {
        layer.name for layer in layers(model) if isinstance(layer, L.BatchNormalization)
    }


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        mine, other = mine.astype("float64"), other.astype("float64")
        largest = np.abs(other).max()
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance * largest)


def tolerance(model: Any) -> float:
    """What rounding in the narrowest dtype in use may come to, of the largest output."""
    return max(TOLERANCE[layer.compute_dtype] for layer in layers(model))


def layers(model: Any) -> list[Any]:
    return [k for k in model._flatten_layers() if not isinstance(k, keras.Model)]


def variables(model: Any) -> Counter[Any]:
    """Every variable: its layer, the class and the flag of that, its own name, its numbers."""
    return Counter(
        (k.name, type(k).__name__, k.trainable, v.name, numbers(v).tobytes())
        for k in layers(model)
        for v in k.variables
    )


def modes(model: Any) -> Counter[Any]:
    """The ``training`` value that is written into each call of a BatchNormalization."""
    sites = [call for call in calls(model) if is_batch_normalization(call.operation)]
    return Counter((call.operation.name, call.training) for call in sites)


def assert_same_config(ours: Any, theirs: Any) -> None:
    """Equal, but where a layer was called again: Keras decides how such calls are numbered."""
    if all(len(layer._inbound_nodes) == 1 for layer in theirs._flatten_layers(include_self=False)):
        assert ours.get_config() == theirs.get_config()
        event("configuration compared")
