"""The tools on models whose layers have several domains: of one domain, or refused."""

from __future__ import annotations

import pathlib
import runpy
from typing import Any

import keras
import numpy as np
import pytest
from layer_cases import array, tensor

import truenorm as tn
from truenorm import BatchNormalization, OptionError

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "domains.py"
DATA = np.random.default_rng(9).normal(3, 2, (64, 4)).astype("float32")


def network(domains: int | None) -> Any:
    """Weights that are the same, whatever the domains, and those of a domain by its number."""
    keras.utils.set_random_seed(2)
    options = {} if domains is None else {"domains": domains, "domain_affine": True}
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3),
            BatchNormalization(name="bn", **options),
            keras.layers.Dense(2),
        ]
    )
    rng = np.random.default_rng(2)
    for variable in model.layers[1].weights:
        values = rng.uniform(0.5, 2, (2, 3))
        variable.assign(values[1] if domains is None else values)
    return model


def test_a_domain_is_folded() -> None:
    several, alone = network(2), network(None)
    folded = tn.fold(several, domain=1).model
    assert [type(layer).__name__ for layer in folded.layers] == ["Dense", "Dense"]
    expected = array(alone(tensor(DATA)))
    np.testing.assert_allclose(array(folded(tensor(DATA))), expected, rtol=1e-4, atol=1e-5)
    left = tn.fold(several).left[0]
    assert left.reason == "it has several domains: fold with domain=0, or another of them"


def test_a_domain_is_recalibrated_and_the_others_stay() -> None:
    several, alone = network(2), network(None)
    before = [array(v) for v in several.layers[1].weights]
    done = tn.recalibrate(several, DATA, domain=1)
    expected = tn.recalibrate(alone, DATA)
    assert done.before == expected.before
    assert done.population.to_dict() == tn.collect(several, DATA, domain=1).to_dict()
    layer, one = several.layers[1], alone.layers[1]
    for name in ("moving_mean", "moving_variance", "gamma", "beta"):
        mine, theirs = array(getattr(layer, name)), array(getattr(one, name))
        np.testing.assert_allclose(mine[1], theirs, rtol=1e-6)
        old = before[[v.name for v in layer.weights].index(name)]
        np.testing.assert_array_equal(mine[0], old[0])
    done.undo()
    for variable, old in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(array(variable), old)
    tn.adapt(several, DATA, prior=10, domain=1)
    expected.undo()
    tn.adapt(alone, DATA, prior=10)
    np.testing.assert_allclose(array(layer.moving_mean)[1], array(one.moving_mean), rtol=1e-6)
    np.testing.assert_array_equal(array(layer.moving_mean)[0], before[2][0])


def test_a_domain_is_diagnosed() -> None:
    found = tn.diagnose(network(2), DATA, select="TN1", domain=1)
    expected = tn.diagnose(network(None), DATA, select="TN1")
    assert [f.code for f in found.findings] == [f.code for f in expected.findings] != []


@pytest.mark.parametrize("tool", [tn.collect, tn.recalibrate, tn.adapt, tn.diagnose])
def test_a_tool_that_is_not_told_which_domain_refuses(tool: Any) -> None:
    with pytest.raises(tn.TruenormError) as caught:
        tool(network(2), DATA)
    assert str(caught.value) == (
        "This BatchNormalization has statistics for several domains (at 'bn'). Expected: one mean "
        "and one variance for each channel. Received: domains=2. Remedy: name one of them: "
        "collect, recalibrate, adapt, diagnose and fold take domain=0."
    )
    with pytest.raises(OptionError) as out:
        tool(network(2), DATA, domain=2)
    assert str(out.value) == (
        "BatchNormalization has no such domain (at 'bn'). Expected: one of its 2 domains, from 0 "
        "to 1. Received: domain 2."
    )
    with pytest.raises(OptionError) as none:
        tool(network(None), DATA, domain=0)
    assert str(none.value) == (
        "No BatchNormalization of this model has domains (at 'domain'). Expected: a model with "
        "layers that were made with domains=n. Received: a domain."
    )


def test_replace_gives_a_model_domains_that_begin_as_it_is() -> None:
    several = tn.replace(network(None), to="truenorm", domains=2, domain_affine=True).model
    expected = array(network(None)(tensor(DATA)))
    for index in range(2):
        with tn.domain(index):
            np.testing.assert_allclose(array(several(tensor(DATA))), expected, rtol=1e-5, atol=1e-6)
    reasons = [
        tn.replace(several, to="truenorm", domains=3).left[0].reason,
        tn.replace(several, to="truenorm", domain_affine=False).left[0].reason,
        *(tn.replace(several, to=to).left[0].reason for to in ("affine", "layer")),
    ]
    assert reasons == [
        "it has 2 domains already",
        "its domains have gamma and beta of their own",
        *["it has several domains"] * 2,
    ]


def test_the_callbacks_refuse_several_domains() -> None:
    callbacks = tn.callbacks
    for callback in (callbacks.Monitor(), callbacks.Recalibrate(DATA), callbacks.SyncStatistics()):
        model = network(2)
        model.compile("sgd", "mse")
        before = array(model.layers[1].moving_mean)
        with pytest.raises(tn.TruenormError, match="has statistics for several domains"):
            model.fit(DATA, DATA[:, :2], verbose=0, callbacks=[callback])
        np.testing.assert_array_equal(array(model.layers[1].moving_mean), before)


def test_modes_are_observed_and_a_copy_has_all_domains() -> None:
    model = network(2)
    with tn.domain(1):
        before = array(model(tensor(DATA)))
        modes = tn.inspect(model)
    assert [site.channels for site in modes.sites] == [3]
    moved = tn.place(model, "after_activation").model
    with tn.domain(1):
        np.testing.assert_allclose(array(moved(tensor(DATA))), before, rtol=1e-5)


@pytest.mark.long
@pytest.mark.any_backend
@pytest.mark.other_packages
def test_the_example_shows_what_domains_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    one, each = (line.split() for line in capsys.readouterr().out.splitlines())
    worst, best = (min(float(line[-3]), float(line[-1])) for line in (one, each))
    assert best > 0.85
    assert worst < best - 0.1
