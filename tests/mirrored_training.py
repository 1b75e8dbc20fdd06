"""Training on the two devices of a ``MirroredStrategy``, in several situations: run as a program.

``python mirrored_training.py FOLDER``: each situation is a function below, and what it returns is
written to ``FOLDER/<situation>.json``. TensorFlow divides the processor into devices before it is
used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import truenorm as tn

MOMENTUM = 0.5
FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
STATISTICS = ("moving_mean", "moving_variance", "renorm_mean", "renorm_stddev", "moving_stddev")


def batch(seed: int = 0) -> np.ndarray:
    """Sixteen samples; the first device gets the first eight, the second the others."""
    parts = [np.random.default_rng([seed, i]).normal(10 * i, 1 + i, (8, 3)) for i in range(2)]
    return np.concatenate(parts).astype("float32")


def strategy() -> Any:
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def rows(variable: Any) -> list[Any]:
    """What each device has of a variable."""
    return [part.numpy().tolist() for part in mirrored.experimental_local_results(variable.value)]


def statistics(layer: Any) -> dict[str, list[Any]]:
    return {k: rows(getattr(layer, k)) for k in STATISTICS if getattr(layer, k, None) is not None}


def network(
    layer: Callable[..., Any], *, rate: float = 0.0, every: int | None = None, **options: Any
) -> tuple[Any, Any]:
    """A compiled model of this one layer, and the layer; gamma and beta learn at this rate."""
    eager = options.pop("run_eagerly", False)
    with mirrored.scope():
        made = layer(momentum=MOMENTUM, **options)
        model = keras.Sequential([keras.Input((3,)), made])
        optimizer = keras.optimizers.SGD(rate, gradient_accumulation_steps=every)
        model.compile(optimizer, "mse", run_eagerly=eager)
    return model, made


def fit(model: Any, x: np.ndarray, size: int = 16, **options: Any) -> Any:
    return model.fit(x, x, batch_size=size, shuffle=False, verbose=0, **options)


def failure(function: Callable[[], Any]) -> dict[str, str]:
    """How it ended."""
    try:
        function()
    except Exception as error:
        return {"name": type(error).__name__, "message": str(error)}
    return {"name": "", "message": ""}


# --- statistics --------------------------------------------------------------------------------


def drifted(layer: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """What the devices have after one step, and who reads which of it."""
    model, made = network(layer, **options)
    fit(model, batch())
    model.save(FOLDER / "model.keras")
    zeros = np.zeros((16, 3), "float32")
    return {
        "devices": statistics(made),
        "get_weights": model.get_weights()[2].tolist(),
        "file": keras.models.load_model(FOLDER / "model.keras").get_weights()[2].tolist(),
        "call": np.asarray(model(zeros)).tolist(),
        "predict": model.predict(zeros, batch_size=16, verbose=0).tolist(),
    }


def keras_drifts() -> Any:
    return drifted(keras.layers.BatchNormalization)


def ours_drifts() -> Any:
    return drifted(tn.BatchNormalization)


def synchronized_does_not() -> Any:
    return drifted(tn.BatchNormalization, synchronized=True)


def made_one(layer: Callable[..., Any]) -> dict[str, Any]:
    """Statistics before and after sync_statistics, called outside of the scope and inside."""
    model, made = network(layer, renorm=True)
    fit(model, batch())
    found: dict[str, Any] = {"before": statistics(made)}
    done = tn.sync_statistics(model)
    found |= {"equal": statistics(made), "record": str(done), "counts": done.counts}
    done.undo()
    found["undone"] = statistics(made)
    with mirrored.scope():
        done = tn.sync_statistics(model, count=[1, 3])
    found |= {"weighted": statistics(made), "drift": done.drift[0].mean}
    found["again"] = tn.sync_statistics(model).drift[0].mean
    found["refused"] = failure(lambda: tn.sync_statistics(model, count=[1, 2, 3]))
    found["nothing"] = failure(lambda: tn.sync_statistics(model, count=0))
    return found


def sync_of_keras() -> Any:
    return made_one(keras.layers.BatchNormalization)


def sync_of_ours() -> Any:
    return made_one(tn.BatchNormalization)


def a_poisoned_device() -> Any:
    model, made = network(tn.BatchNormalization)
    second = mirrored.experimental_local_results(made.moving_mean.value)[1]
    second.assign([np.nan, 4.0, 4.0])
    tn.sync_statistics(model)
    return statistics(made)


def callback() -> Any:
    """Validation finds the statistics made one."""
    model, made = network(tn.BatchNormalization)
    seen: list[Any] = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(statistics(made))  # noqa: ARG005
    )
    sync = tn.callbacks.SyncStatistics()
    history = fit(model, batch(), callbacks=[look, sync], validation_data=(batch(1), batch(1)))
    return {
        "before": seen[-1],
        "after": statistics(made),
        "val_loss": history.history["val_loss"][0],
        "record": str(sync.last),
    }


def putting_back() -> Any:
    """Tools that change a model for a while, or can undo it, with devices that have drifted."""
    model, made = network(tn.BatchNormalization, domains=2)
    fit(model, batch())
    found = {"domain before": statistics(made)}
    done = tn.recalibrate(model, batch(1), domain=1)
    found["domain after"] = statistics(made)
    done.undo()
    found["domain undone"] = statistics(made)

    class Subclassed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = keras.layers.BatchNormalization(momentum=MOMENTUM)

        def call(self, x: Any, training: Any = None) -> Any:
            return self.norm(x, training=training)

    with mirrored.scope():
        other = Subclassed()
        other.compile("sgd", "mse")
    fit(other, batch())
    found["before"] = statistics(other.norm)
    tn.inspect(other, batch(), batch())
    found["inspected"] = statistics(other.norm)
    done = tn.recalibrate(other, batch(1))
    found["recalibrated"] = statistics(other.norm)
    found["gap"] = done.before[0].mean
    done.undo()
    found["undone"] = statistics(other.norm)
    return found


# --- accumulation ------------------------------------------------------------------------------


def gathered(synchronized: bool) -> dict[str, Any]:
    """Three batches by twos: a step, one that waits, and the end of the accumulation."""
    model, made = network(tn.BatchNormalization, synchronized=synchronized, accumulation_steps=2)
    fit(model, np.concatenate([batch(0), batch(1)]))
    found = {"step": statistics(made)}
    fit(model, batch(2))
    found |= {"waiting": statistics(made)}
    made.end_accumulation()
    return found | {"ended": statistics(made), "gathered": rows(made.gathered)}


def gathered_alone() -> Any:
    return gathered(synchronized=False)


def gathered_together() -> Any:
    return gathered(synchronized=True)


def optimizer(layer: Callable[..., Any], run_eagerly: bool, **options: Any) -> dict[str, Any]:
    """Keras's optimizer that accumulates gradients, for one step of two batches."""
    model, made = network(layer, rate=0.1, every=2, run_eagerly=run_eagerly, **options)
    found: dict[str, Any] = failure(lambda: fit(model, np.concatenate([batch(0), batch(1)])))
    return found | {"beta": rows(made.beta), **statistics(made)}


def optimizers() -> Any:
    ours = {"synchronized": True, "accumulation_steps": 2}
    return {
        "stock": optimizer(keras.layers.BatchNormalization, run_eagerly=False),
        "ours": optimizer(tn.BatchNormalization, run_eagerly=False, **ours),
        "eager": optimizer(tn.BatchNormalization, run_eagerly=True, **ours),
    }


def by_hand() -> Any:
    """A loop that adds up the gradients of two batches, and makes one step of them."""
    model, made = network(tn.BatchNormalization, synchronized=True, accumulation_steps=2)
    weights = [made.gamma, made.beta]
    with mirrored.scope():
        sums = [keras.Variable(np.zeros(3), dtype="float32", trainable=False) for _ in weights]
        sgd = keras.optimizers.SGD(0.1)
        sgd.build(weights)

    def add(x: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - x)) / 2  # devices
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        for total, gradient in zip(sums, gradients, strict=True):
            total.assign(total.value + gradient / 2)  # batches

    def step() -> None:
        sgd.apply([total.value for total in sums], weights)  # adds up those of the devices
        for total in sums:
            total.assign(np.zeros(3))

    def own(x: np.ndarray, context: Any) -> Any:
        return tf.constant(np.split(x, 2)[context.replica_id_in_sync_group])

    for seed in range(2):
        parts = mirrored.experimental_distribute_values_from_function(partial(own, batch(seed)))
        tf.function(lambda parts: mirrored.run(add, (parts,)))(parts)
    tf.function(lambda: mirrored.run(step))()
    return {"beta": rows(made.beta), "gamma": rows(made.gamma), **statistics(made)}


# --- domains -----------------------------------------------------------------------------------


def contexts(synchronized: bool) -> dict[str, Any]:
    """Two calls of ``fit`` and one of ``predict``, compiled in another domain."""
    model, made = network(tn.BatchNormalization, domains=2, synchronized=synchronized)
    fit(model, batch())
    with tn.domain(1):
        fit(model, batch(1))
        predicted = model.predict(batch(1), batch_size=16, verbose=0)
    return statistics(made) | {"predict": predicted.tolist()}


def a_domain_alone() -> Any:
    return contexts(synchronized=False)


def a_domain_of_a_new_strategy() -> Any:
    """Made where a domain is entered already; and used once more when it is left."""
    with tn.domain(1):
        with strategy().scope():
            made = tn.BatchNormalization(momentum=MOMENTUM, domains=2)
            model = keras.Sequential([keras.Input((3,)), made])
            model.compile(keras.optimizers.SGD(0.0), "mse")
        fit(model, batch(1))
    fit(model, batch(0))
    return statistics(made)


def a_domain_together() -> Any:
    return contexts(synchronized=True)


def domains_by_sample() -> Any:
    """The second device has no sample of the second domain."""
    with mirrored.scope():
        x, index = keras.Input((3,)), keras.Input((), dtype="int32")
        made = tn.BatchNormalization(momentum=MOMENTUM, domains=2, synchronized=True)
        model = keras.Model([x, index], made(x, domain=index))
        model.compile(keras.optimizers.SGD(0.0), "mse")
    numbers = np.array([0, 1] * 4 + [0] * 8)
    data = [batch(), numbers]
    loss = model.evaluate(data, batch(), verbose=0)  # compiled before it is trained
    model.fit(data, batch(), batch_size=16, shuffle=False, verbose=0)
    return statistics(made) | {"domains": numbers.tolist(), "loss": loss}


class TwoDomains(keras.Model):
    """Each step sees its batch, and as domain 1 what is one more."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(self(x, training=True) - y))
            with tn.domain(1):
                loss += keras.ops.mean(keras.ops.square(self(x + 1, training=True) - y))
        learned = self.trainable_variables
        gradients = tape.gradient(loss, [variable.value for variable in learned])
        self.optimizer.apply(gradients, learned)
        return {"loss": loss}


def a_domain_in_a_step() -> Any:
    """The layer that was made first belongs to another strategy, or to none; see main()."""
    with mirrored.scope():
        x = keras.Input((3,))
        made = tn.BatchNormalization(momentum=MOMENTUM, domains=2, synchronized=True)
        model = TwoDomains(x, made(x))
        model.compile("sgd", "mse")
    fit(model, batch())
    found: dict[str, Any] = statistics(made)
    plain = tn.BatchNormalization(momentum=MOMENTUM, domains=2)
    plain(batch(), training=True)
    return found | {"plain": plain.moving_mean.numpy().tolist()}


# --- callbacks ---------------------------------------------------------------------------------


def trained(callbacks: list[Any], rate: float) -> tuple[Any, Any]:
    model, made = network(tn.BatchNormalization, rate=rate)
    x = np.concatenate([batch(seed) for seed in range(4)])
    history = fit(model, x, epochs=2, callbacks=callbacks, validation_data=(x, x))
    return history.history, [rows(variable) for variable in model.variables] + [statistics(made)]


def first_look(monitor: tn.callbacks.Monitor) -> dict[str, Any]:
    assert monitor.history is not None
    return {name: monitor.history.values[name][0].tolist() for name in ("distance", "noise")}


def a_monitor() -> Any:
    """Its numbers, those of what the first device saw alone, and that it changes nothing."""
    _, without = trained([], rate=0.01)
    monitor = tn.callbacks.Monitor(validation=(batch(), batch()))
    history, watched = trained([monitor], rate=0.01)
    assert monitor.history is not None
    steady, alone = tn.callbacks.Monitor(), tn.callbacks.Monitor()
    trained([steady], rate=0.0)
    plain = keras.Sequential([keras.Input((3,)), tn.BatchNormalization(momentum=MOMENTUM)])
    plain.compile(keras.optimizers.SGD(0.0), "mse")
    fit(plain, np.concatenate([batch(seed)[:8] for seed in range(4)]), 8, callbacks=[alone])
    return {
        "same": without == watched,
        "history": {name: values for name, values in history.items() if name.startswith("bn_")},
        "modes": monitor.history.modes,
        "values": first_look(steady),
        "alone": first_look(alone),
    }


def recalibrating() -> Any:
    """All devices validate with the population's statistics."""
    x = np.concatenate([batch(seed) for seed in range(4)])
    recalibrate = tn.callbacks.Recalibrate(x)
    history, found = trained([recalibrate], rate=0.0)
    return {"val_loss": history["val_loss"], "statistics": found[-1], "data": x.tolist()}


SITUATIONS = (
    keras_drifts, ours_drifts, synchronized_does_not, sync_of_keras, sync_of_ours,
    a_poisoned_device, callback, putting_back, gathered_alone, gathered_together, optimizers,
    by_hand, a_domain_alone, a_domain_of_a_new_strategy, a_domain_together, domains_by_sample,
    a_domain_in_a_step, a_monitor, recalibrating,
)  # fmt: skip


def main() -> None:
    tn.BatchNormalization(domains=2)
    with strategy().scope():
        tn.BatchNormalization(domains=2)
    for situation in SITUATIONS:
        found = json.dumps(situation())
        (FOLDER / f"{situation.__name__}.json").write_text(found, "utf-8")


if __name__ == "__main__":
    (processor,) = tf.config.list_physical_devices("CPU")
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(processor, halves)
    mirrored = strategy()
    main()
