"""callbacks.Recalibrate: when it acts in fit, and that averaged weights need it."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest

import truenorm as tn

X = np.random.default_rng(0).normal(3.0, 2.0, size=(64, 4)).astype("float32")


def network(**options: Any) -> Any:
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, activation="relu"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(4),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, **options), "mse")
    return model


class Recording(tn.callbacks.Recalibrate):
    """Notes when it recalibrates, and what a validation would say at the epoch's end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(X, batch_size=64, **options)
        self.epoch = 0
        self.did: list[str] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self.epoch = epoch

    def on_test_begin(self, logs: Any = None) -> None:
        before = self.last
        super().on_test_begin(logs)
        if self.last is not before:
            self.did.append(f"before validation {self.epoch}")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        before = self.last
        super().on_epoch_end(epoch, logs)
        if self.last is not before:
            self.did.append(f"after {self.epoch}")

    def on_train_end(self, logs: Any = None) -> None:
        super().on_train_end(logs)
        self.did.append("at the end")


def settled(model: Any) -> float:
    """How far the moving statistics are from those of the data now, in standard deviations."""
    return max(gap.mean for gap in tn.recalibrate(model, X, batch_size=64).before)


def test_it_acts_before_every_second_validation_and_at_the_end() -> None:
    model, callback = network(), Recording(every=2)
    history = model.fit(
        X, X, epochs=4, batch_size=16, validation_data=(X, X), callbacks=[callback], verbose=0
    ).history
    assert callback.did == ["before validation 1", "before validation 3", "at the end"]
    assert model.evaluate(X, X, verbose=0) == pytest.approx(history["val_loss"][3], rel=1e-4)
    model.evaluate(X, X, verbose=0, callbacks=[callback])  # a test of its own is not touched
    assert len(callback.did) == 3
    assert settled(model) < 1e-5


def test_without_validation_it_acts_at_the_end_of_the_epoch() -> None:
    callback = Recording(every=1)
    model = network()
    model.fit(X, X, epochs=2, batch_size=16, callbacks=[callback], verbose=0)
    assert callback.did == ["after 0", "after 1", "at the end"]


def test_averaged_weights_get_statistics_of_their_own() -> None:
    average = {"use_ema": True, "ema_momentum": 0.9}
    stale, fresh = network(**average), network(**average)
    fresh.set_weights(stale.get_weights())
    for model, callbacks in ((stale, []), (fresh, [Recording(every=9)])):
        model.fit(
            X, X, epochs=6, batch_size=16, shuffle=False, callbacks=callbacks, verbose=0
        )  # Keras puts the averages in when the training ends
    np.testing.assert_allclose(stale.get_weights()[0], fresh.get_weights()[0], rtol=1e-5)
    assert settled(fresh) < 1e-5
    assert settled(stale) > 0.1


def test_a_population_is_no_data_while_the_weights_change() -> None:
    population = tn.collect(network(), X)
    with pytest.raises(tn.OptionError, match="A population is of weights as they once were"):
        tn.callbacks.Recalibrate(population)


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_a_period_that_is_none_is_refused(every: Any) -> None:
    with pytest.raises(tn.OptionError, match="every must be a positive integer"):
        tn.callbacks.Recalibrate(X, every)


def two_domains() -> Any:
    layers = [tn.BatchNormalization(domains=2, name="bn"), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("sgd", "mse")
    return model


def test_each_domain_is_recalibrated_with_its_own_data() -> None:
    model = two_domains()
    callbacks = [
        tn.callbacks.Recalibrate(data, domain=domain, progress=False)
        for domain, data in enumerate((X, 5 * X + 10))
    ]
    model.fit(X, X, epochs=2, callbacks=callbacks, verbose=0)
    bn = model.get_layer("bn")
    mean, variance = (
        keras.ops.convert_to_numpy(one) for one in (bn.moving_mean, bn.moving_variance)
    )
    data = X.astype("float64")
    np.testing.assert_allclose(mean, [data.mean(0), 5 * data.mean(0) + 10], rtol=1e-6)
    np.testing.assert_allclose(variance, [data.var(0), 25 * data.var(0)], rtol=1e-6)
    last = callbacks[1].last
    assert last is not None
    last.undo()
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(bn.moving_mean), [data.mean(0), 5 * data.mean(0) + 10], rtol=1e-6
    )  # as the epoch before left them


@pytest.mark.parametrize(
    ("model", "domain", "message"),
    [
        (two_domains, 2, "BatchNormalization has no such domain (at 'bn'). Expected: one of its 2 "
         "domains, from 0 to 1. Received: domain 2"),
        (network, 0, "No BatchNormalization of this model has domains (at 'domain'). Expected: a "
         "model with layers that were made with domains=n. Received: a domain"),
        (two_domains, None, "This BatchNormalization has statistics for several domains (at 'bn')"),
    ],
)  # fmt: skip
def test_a_domain_that_cannot_be_is_refused_before_training(
    model: Any, domain: int | None, message: str
) -> None:
    callback = tn.callbacks.Recalibrate(X, domain=domain)
    built = model()
    before = built.get_weights()
    with pytest.raises(tn.TruenormError, match=re.escape(message)):
        built.fit(X, X, callbacks=[callback], verbose=0)
    for old, new in zip(before, built.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_domain_that_is_no_number_is_refused() -> None:
    with pytest.raises(tn.OptionError, match="domain must be 0 or a positive integer"):
        tn.callbacks.Recalibrate(X, domain=-1)


def test_a_class_of_ones_own_is_refused_before_the_first_epoch() -> None:
    class Own(keras.layers.BatchNormalization):
        def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
            return super().call(inputs, training=training, mask=mask)

    model = keras.Sequential([keras.Input((4,)), Own(name="own"), keras.layers.Dense(4)])
    model.compile("sgd", "mse")
    before = keras.ops.convert_to_numpy(model.layers[0].moving_mean).copy()
    with pytest.raises(tn.ModelError, match="custom subclass"):
        model.fit(X, X, verbose=0, callbacks=[tn.callbacks.Recalibrate(X)])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.layers[0].moving_mean), before)
