"""Which statistics normalised in a custom subclass: found out from the numbers, never inferred."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import truenorm as tn
from truenorm._kernels import reference
from truenorm._modes import which_statistics
from truenorm._modes.which_statistics import statistics_of

registered = keras.saving.register_keras_serializable("evidence")


@registered
class Always(keras.layers.BatchNormalization):
    """Normalises by the batch in arithmetic of its own, whatever it is asked for."""

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG002
        mean, variance = keras.ops.mean(x, axis=0), keras.ops.var(x, axis=0)
        x = (x - mean) / keras.ops.sqrt(variance + self.epsilon)
        return keras.ops.cast(x * self.gamma + self.beta, self.compute_dtype)


@registered
class Forced(keras.layers.BatchNormalization):
    """As in Mask R-CNN: inference mode always."""

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG002
        return super().call(x, training=False, mask=mask)


@registered
class ForcedOurs(tn.BatchNormalization):
    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG002
        return super().call(x, training=False, mask=mask)


@registered
class Same(keras.layers.BatchNormalization):
    """A ``call`` of its own that does what Keras's does."""

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(x, training=training, mask=mask)


@registered
class Between(keras.layers.BatchNormalization):
    """In training half of each."""

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        first, second = (super(Between, self).call(x, training=t, mask=mask)
                         for t in (training, False))  # fmt: skip
        return (first + second) / 2


@registered
class Silent(keras.layers.BatchNormalization):
    """Its output is beta alone: nothing can be said."""

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        return 0.0 * super().call(x, training=training, mask=mask)

    def build(self, shape: Any) -> None:
        super().build(shape)
        self.gamma.assign(keras.ops.zeros(self.gamma.shape))


IN_TRAINING, IN_INFERENCE = ("fit", "model(x, training=True)"), ("evaluate", "predict", "model(x)")
CASES = {
    Always: ("batch", "batch", "the batch's own statistics in evaluate, predict, model(x)"),
    Forced: ("moving", "moving", "the moving statistics in fit, model(x, training=True)"),
    ForcedOurs: ("moving", "moving", "the moving statistics in fit, model(x, training=True)"),
    Same: ("batch", "moving", None),
    Between: ("neither", "moving",
              "something else than the batch's own or the moving statistics in fit, "
              "model(x, training=True)"),
    Silent: ("unknown", "unknown", None),
}  # fmt: skip


def model_of(kind: Any, dtype: str = "float32") -> Any:
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    inputs = keras.Input((3,))
    x = kind(name="bn", dtype=policy)(keras.layers.Dense(4, dtype=policy)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse")
    return model


X, Y = np.random.default_rng(0).normal(1, 2, (16, 3)).astype("float32"), np.ones((16, 1), "float32")


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_inspect_tells_what_a_call_of_its_own_does_and_names_the_class(kind: Any) -> None:
    training, inference, uses = CASES[kind]
    inspection = tn.inspect(model_of(kind), X, Y)
    statistics = {entry: mode.statistics for entry, (mode,) in inspection.modes.items()}
    assert statistics == {
        **dict.fromkeys(IN_TRAINING, training), **dict.fromkeys(IN_INFERENCE, inference)
    }  # fmt: skip
    assert [(one.code, one.explanation) for one in inspection.surprises] == (
        [] if uses is None else [(
            "own_call",
            f"its class {kind.__name__} has a call() of its own, which normalises with {uses}, "
            "whatever training= and trainable ask for",
        )]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float32") for kind in CASES), (Always, "bfloat16"), (Forced, "float16")],
)
def test_observe_tells_it_in_a_training_too(kind: Any, dtype: str) -> None:
    training, inference, _ = CASES[kind]
    model = model_of(kind, dtype)
    with tn.observe(model) as seen:
        model.fit(X, Y, batch_size=8, verbose=0)
        model.predict(X, verbose=0)
    assert [calls.describe() for calls in seen.modes["bn"].calls] == [
        f"2× training=True: {training}",
        f"1× training=False: {inference}",
    ]


def test_frozen_it_may_do_as_it_likes_all_the_same() -> None:
    model = model_of(Always)
    model.get_layer("bn").trainable = False
    inspection = tn.inspect(model, X)
    assert inspection.modes["fit"][0].describe() == "batch"
    explanations = {one.code: one.explanation for one in inspection.surprises}
    assert explanations["frozen"] == "it is frozen (trainable=False)"
    assert "the batch's own statistics in fit, evaluate" in explanations["own_call"]


def test_a_call_set_on_the_instance_is_one_of_its_own() -> None:
    model = model_of(keras.layers.BatchNormalization)
    layer = model.get_layer("bn")
    layer.call = lambda x, **_: type(layer).call(layer, x, training=False)
    with tn.observe(model) as seen:
        model(X, training=True)
    assert seen.modes["bn"].statistics == "moving"


def test_an_option_that_changes_the_output_makes_it_unknown() -> None:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, ForcedOurs(name="bn", activation="relu")(inputs))
    assert tn.inspect(model, X).modes["predict"][0].statistics == "unknown"


# --- the judgement by itself --------------------------------------------------------------------


def numbers_of(x: Any, mask: Any = None, axis: int = -1) -> dict[str, Any]:
    channels = x.shape[axis]
    gamma, beta = np.linspace(0.5, 2, channels), np.linspace(-1, 1, channels)
    mean, variance = np.full(channels, 0.3), np.full(channels, 2.0)
    return {"inputs": x, "mean": mean, "variance": variance, "gamma": gamma, "beta": beta,
            "mask": mask}  # fmt: skip


def judged(numbers: dict[str, Any], outputs: Any, axis: int = -1, dtype: str = "float32") -> str:
    found = {**numbers, "outputs": outputs.astype("float32")}
    return statistics_of(found, axis=axis, epsilon=1e-3, dtype=dtype)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("masked", [None, "without_channels", "keras", "silent_channel"])
def test_the_output_shows_which_normalisation_it_is(axis: int, masked: str | None) -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(2, 3, (6, 5, 4)).astype("float32")
    rows = np.delete(x.shape, axis if masked == "without_channels" else -1)
    mask = None if masked is None else generator.random(rows) < 0.5
    if masked == "silent_channel":
        mask[:, 1] = False
    numbers = numbers_of(x, mask, axis)
    gamma, beta = numbers["gamma"], numbers["beta"]
    options: dict[str, Any] = {"axis": axis, "epsilon": 1e-3}
    batch = reference.forward(x, gamma, beta, mask=mask, **options).output
    moving = reference.infer(x, numbers["mean"], numbers["variance"], gamma, beta, **options)
    assert judged(numbers, batch, axis) == "batch"
    assert judged(numbers, moving, axis) == "moving"
    assert judged(numbers, 0.5 * batch + 0.5 * moving, axis) == "neither"
    assert judged(numbers, x, axis) == "neither"
    assert judged(numbers, batch[:1], axis) == "neither"


def test_of_many_values_a_few_channels_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(which_statistics, "MOST_VALUES", 60)
    generator = np.random.default_rng(1)
    x = generator.normal(2, 3, (6, 5, 5)).astype("float32")
    mask = generator.random((6, 5)) < 0.5
    mask[:, 0] = False
    numbers = numbers_of(x, mask, 1)
    batch = reference.forward(x, numbers["gamma"], numbers["beta"], axis=1, mask=mask).output
    batch[:, 3:] = 0  # not looked at
    assert judged(numbers, batch, 1) == "batch"


def test_a_mask_that_lets_nothing_count_or_does_not_fit_tells_nothing() -> None:
    x = np.random.default_rng(1).normal(2, 3, (6, 5, 4)).astype("float32")
    batch = reference.forward(x).output
    assert judged(numbers_of(x, np.zeros((6, 5), bool)), batch) == "unknown"
    assert judged(numbers_of(x, np.ones((6, 4), bool)), batch) == "unknown"


@pytest.mark.parametrize("kind", [Same, Forced])
def test_a_mask_of_samples_and_channels(kind: Any) -> None:
    x = np.random.default_rng(1).normal(2, 3, (8, 3, 4)).astype("float32")
    x[:, 1], x[2:5, 0] = 0, 0
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, kind(axis=1, name="bn")(keras.layers.Masking()(inputs)))
    with tn.observe(model) as seen:
        model(x, training=True)
    assert seen.modes["bn"].statistics == ("batch" if kind is Same else "moving")


def test_what_rounding_could_explain_is_unknown() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(64, 2))
    numbers = {**numbers_of(x), "mean": x.mean(0), "variance": x.var(0)}
    batch = reference.forward(x, numbers["gamma"], numbers["beta"]).output
    assert judged(numbers, batch) == "unknown"  # the moving statistics are the batch's
    near = {**numbers, "mean": x.mean(0) + 0.02}
    assert judged(near, batch) == "batch"
    assert judged(near, batch, dtype="bfloat16") == "unknown"
    far = generator.normal(1e4, 0.1, (64, 2))
    assert judged(numbers_of(far), reference.forward(far).output) == "unknown"
    empty = np.zeros((0, 2))
    assert judged(numbers_of(empty), empty) == "unknown"
    assert judged(numbers_of(x * np.nan), x * np.nan) == "unknown"
