"""freeze and unfreeze: what learns afterwards, at once on every backend, and the way back."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from small_models import inputs_for, nested, residual, snapshot, subclassed

import truenorm as tn

AFFINE, STATISTICS = {"gamma", "beta"}, {"moving_mean", "moving_variance"}
LEARNS = {"none": AFFINE | STATISTICS, "all": set(), "statistics": AFFINE, "affine": STATISTICS}


def compiled(model: Any, optimizer: Any = None) -> Any:
    model.compile(optimizer or keras.optimizers.Adam(1e-2), "mse")
    return model


def fit(model: Any) -> None:
    x = inputs_for(model, 8)
    y = np.random.default_rng(0).normal(size=(8, *model.output_shape[1:])).astype("float32")
    model.fit(x, y, batch_size=4, epochs=1, verbose=0)


def values(thing: Any) -> dict[str, bytes]:
    return {v.path: np.array(keras.ops.convert_to_numpy(v)).tobytes() for v in thing.variables}


def what_fit_changes(model: Any, name: str) -> set[str]:
    layer = model.get_layer(name)
    before = values(layer)
    fit(model)
    return {path.split("/")[-1] for path, value in values(layer).items() if value != before[path]}


@pytest.fixture(scope="module")
def trained() -> Any:
    """A trained model, compiled once for all tests that undo what they do."""
    model = compiled(residual("truenorm"))
    fit(model)
    return model


@pytest.mark.parametrize("policy", LEARNS)
def test_a_policy_holds_at_once_after_fit_and_is_undone(trained: Any, policy: str) -> None:
    """Trap 11: Keras alone does not see to this, see ``test_trainable_changed_by_hand.py``."""
    frozen = tn.freeze(trained, policy, layers="a_bn")  # pyright: ignore[reportArgumentType]
    assert [(one.path, one.before, one.after) for one in frozen.layers] == [
        ("a_bn", "none", policy)
    ]
    assert what_fit_changes(trained, "a_bn") == LEARNS[policy]
    frozen.undo()
    assert what_fit_changes(trained, "a_bn") == LEARNS["none"]


def test_freeze_and_undo_leave_every_byte(trained: Any) -> None:
    before = snapshot(trained)[:2], values(trained.optimizer)
    optimizer = trained.optimizer
    frozen = tn.freeze(trained, "affine")
    assert len(trained.optimizer.variables) < len(before[1])
    frozen.undo()
    assert (snapshot(trained)[:2], values(trained.optimizer)) == before
    assert trained.optimizer is optimizer


def test_undo_restores_flags_of_single_variables_and_policies_that_were_hidden() -> None:
    model = residual("truenorm")
    layer, other = model.get_layer("a_bn"), model.get_layer("b_bn")
    layer.beta.trainable = False
    other.freeze, other.trainable = "statistics", False
    tn.freeze(model, "affine").undo()
    assert (layer.gamma.trainable, layer.beta.trainable) == (True, False)
    assert other.freeze == "all"
    other.trainable = True
    assert other.freeze == "statistics"


def test_the_optimizer_keeps_what_it_knows_of_the_rest(trained: Any) -> None:
    def momentum(name: str) -> Any:
        (found,) = (v for v in trained.optimizer.variables if name in v.path and "moment" in v.path)
        return np.array(keras.ops.convert_to_numpy(found))

    kernel, steps = momentum("head_kernel"), int(trained.optimizer.iterations)
    assert np.abs(kernel).max() > 0
    trained.optimizer.learning_rate = 0.125
    frozen = tn.freeze(trained, "all")
    np.testing.assert_array_equal(momentum("head_kernel"), kernel)
    assert int(trained.optimizer.iterations) == steps
    assert float(trained.optimizer.learning_rate) == 0.125
    frozen.undo()
    trained.optimizer.learning_rate = 0.01


def test_unfreezing_after_fit_gives_the_optimizer_the_new_variables() -> None:
    """The other direction of trap 11: every backend of Keras fails or ignores it."""
    model = residual()
    model.get_layer("a_bn").trainable = False
    fit(compiled(model))
    tn.unfreeze(model, layers=[model.get_layer("a_bn")])
    assert what_fit_changes(model, "a_bn") == LEARNS["none"]


def test_an_optimizer_with_loss_scaling_stays_the_users_object() -> None:
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    model = compiled(residual(), keras.optimizers.LossScaleOptimizer(inner))
    model.optimizer.build(model.trainable_variables)
    tn.freeze(model)
    assert model.optimizer.inner_optimizer is inner
    assert len(inner._trainable_variables) == len(model.trainable_variables)


@pytest.mark.parametrize("policy", ["statistics", "affine"])
def test_what_kerass_layer_cannot_do_is_refused_and_nothing_changed(policy: Any) -> None:
    model = nested()
    before = snapshot(model)
    message = (
        rf"^Keras's BatchNormalization cannot be frozen in part \(policy '{policy}'\) \(at "
        r"'backbone/stem_bn'\)\. Expected: truenorm's BatchNormalization, or the policy 'all' or "
        r"'none'\. Received: keras\.BatchNormalization\. Remedy: put truenorm's layer in its "
        r"place: replace\(model, to='truenorm'\)\.model, or truenorm\.BatchNormalization where the "
        r"model is made\.$"
    )
    with pytest.raises(tn.ModelError, match=message):
        tn.freeze(model, policy)
    assert snapshot(model) == before
    replaced = tn.replace(model, to="truenorm").model
    assert {one.after for one in tn.freeze(replaced, policy).layers} == {policy}


@pytest.mark.parametrize(
    ("layers", "paths"),
    [
        (None, ["backbone/stem_bn", "backbone/a_bn", "backbone/b_bn", "backbone/c_bn",
                "head_model/bn"]),
        ("backbone/?_bn", ["backbone/a_bn", "backbone/b_bn", "backbone/c_bn"]),
        (lambda layer: layer.moving_mean.shape[0] == 4 and layer.name == "bn", ["head_model/bn"]),
        (["head_model/*", "*/stem_bn"], ["backbone/stem_bn", "head_model/bn"]),
    ],
)  # fmt: skip
def test_layers_are_chosen_by_path_predicate_or_list(layers: Any, paths: list[str]) -> None:
    assert [one.path for one in tn.freeze(nested(), layers=layers).layers] == paths


def test_a_layer_that_contains_others_stands_for_them() -> None:
    model = nested()
    frozen = tn.freeze(model, layers=[model.get_layer("head_model")])
    assert [one.path for one in frozen.layers] == ["head_model/bn"]
    assert "head_model/bn │ none │ all" in str(frozen)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(tn.OptionError, match=r"^No BatchNormalization of the model is meant"):
        tn.freeze(residual(), layers="backbone/*")
    with pytest.raises(tn.OptionError, match=r"There is no such freeze policy.*'frozen'\.$"):
        tn.freeze(residual(), "frozen")  # pyright: ignore[reportArgumentType]


def test_a_child_of_a_frozen_parent_is_noted() -> None:
    """Trap 12."""
    model = nested()
    model.get_layer("backbone").trainable = False
    (note,) = tn.unfreeze(model, layers="backbone/a_bn").notes
    assert note.startswith("'backbone' is frozen: gamma and beta of the 1 layer inside")


def test_a_subclassed_model_is_frozen_too() -> None:
    model = subclassed()
    assert [one.after for one in tn.freeze(model).layers] == ["all"]
    assert model.bn.trainable is False


# --- FreezeStatistics --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["statistics", "all"])
def test_the_callback_freezes_from_its_epoch_on_and_gives_back(policy: Any) -> None:
    model = compiled(residual("truenorm"))
    x, y = inputs_for(model, 8), np.ones((8, 3), "float32")
    late = tn.callbacks.FreezeStatistics(after_epoch=1, policy=policy, layers="a_bn")
    snapshots: list[dict[str, bytes]] = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: snapshots.append(values(model.get_layer("a_bn")))
    )
    model.fit(x, y, epochs=3, callbacks=[late, look], verbose=0)
    first, second, third = snapshots
    changed = {path.split("/")[-1] for path in first if first[path] != third[path]}
    assert changed == (AFFINE if policy == "statistics" else set())
    assert second.keys() == third.keys()
    assert model.get_layer("a_bn").freeze == "none"
    assert what_fit_changes(model, "a_bn") == LEARNS["none"]


def test_the_callback_refuses_at_the_start_of_fit() -> None:
    model = compiled(residual())
    x, y = inputs_for(model, 8), np.ones((8, 3), "float32")
    with pytest.raises(
        tn.ModelError, match=r"^Keras's BatchNormalization cannot be frozen in part"
    ):
        model.fit(x, y, callbacks=[tn.callbacks.FreezeStatistics(after_epoch=100)], verbose=0)
    message = r"^after_epoch must be 0 or a positive integer\. Received: -1\.$"
    with pytest.raises(tn.OptionError, match=message):
        tn.callbacks.FreezeStatistics(after_epoch=-1)


# --- what a review found ------------------------------------------------------------------------


def small(optimizer: Any = "sgd") -> Any:
    layers = [keras.layers.Dense(4), tn.BatchNormalization(name="bn"), keras.layers.Dense(1)]
    return compiled(keras.Sequential([keras.Input((4,)), *layers]), optimizer)


def test_a_function_that_somebody_still_holds_is_not_run_again() -> None:
    """``jax.jit`` finds its program again under an equal method, as long as it is referred to."""
    model = small()
    fit(model)
    held = model.train_function
    tn.freeze(model, "statistics")
    assert what_fit_changes(model, "bn") == AFFINE
    assert held is not model.train_function


def test_averages_of_weights_that_learn_again_start_at_the_weights() -> None:
    model = small(keras.optimizers.SGD(1e-3, use_ema=True))
    fit(model)
    tn.freeze(model, "all")
    fit(model)
    tn.unfreeze(model)
    fit(model)
    gamma = keras.ops.convert_to_numpy(model.get_layer("bn").gamma)
    np.testing.assert_allclose(gamma, 1.0, atol=0.05)


def test_a_schedule_or_function_of_the_learning_rate_stays_the_very_same() -> None:
    class Constant(keras.optimizers.schedules.LearningRateSchedule):
        """Without a config."""

        def __call__(self, step: Any) -> float:  # noqa: ARG002
            return 0.01

    schedule = Constant()
    model = small(keras.optimizers.Adam(schedule))
    fit(model)
    tn.freeze(model)
    assert model.optimizer._learning_rate is schedule
    assert what_fit_changes(model, "bn") == set()


def test_an_optimizer_that_cannot_be_made_again_is_refused_and_nothing_changed() -> None:
    class Own(keras.optimizers.SGD):
        def __init__(self, needed: int) -> None:
            super().__init__(0.01 * needed)

    model = small(Own(1))
    fit(model)
    before = snapshot(model)
    with pytest.raises(tn.ModelError, match=r"optimizer cannot be made again from its config"):
        tn.freeze(model)
    assert snapshot(model) == before


def test_the_callback_gives_back_what_an_interrupted_fit_left_frozen() -> None:
    model = small()
    x, y = inputs_for(model, 8), np.ones((8, 1), "float32")
    late = tn.callbacks.FreezeStatistics(after_epoch=1)

    def interrupt(epoch: int, _: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    interrupting = keras.callbacks.LambdaCallback(on_epoch_end=interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, epochs=3, callbacks=[late, interrupting], verbose=0)
    assert model.get_layer("bn").freeze == "statistics"
    model.fit(x, y, epochs=1, callbacks=[late], verbose=0)
    assert model.get_layer("bn").freeze == "none"
