"""Small models that the tests of the tools share."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import truenorm as tn

LAYERS = {"keras": keras.layers.BatchNormalization, "truenorm": tn.BatchNormalization}


def dense(kind: str = "keras", position: str = "before_activation") -> Any:
    """Sequential: dense, BatchNormalization and ReLU in the given order, dense."""
    chain = [keras.layers.Dense(6, name="hidden")]
    batch_norm, relu = LAYERS[kind](name="bn"), keras.layers.ReLU(name="relu")
    chain += {
        "none": [relu],
        "before_activation": [batch_norm, relu],
        "after_activation": [relu, batch_norm],
    }[position]
    return keras.Sequential([keras.Input((5,)), *chain, keras.layers.Dense(3, name="head")])


def residual(kind: str = "keras", use_bias: bool = True) -> Any:
    """Functional: four BatchNormalization, three before a ReLU and one before an Add."""

    def unit(x: Any, name: str, relu: bool = True) -> Any:
        x = keras.layers.Conv2D(4, 3, padding="same", use_bias=use_bias, name=f"{name}_conv")(x)
        x = LAYERS[kind](name=f"{name}_bn")(x)
        return keras.layers.ReLU(name=f"{name}_relu")(x) if relu else x

    inputs = keras.Input((6, 6, 3), name="image")
    x = unit(inputs, "stem")
    x = keras.layers.Add(name="add")([x, unit(unit(x, "a"), "b", relu=False)])
    x = unit(keras.layers.ReLU(name="add_relu")(x), "c")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="residual")


def nested(kind: str = "keras") -> Any:
    """A functional backbone and a Sequential head, each with BatchNormalization, inside a model."""
    inputs = keras.Input((6, 6, 3), name="image")
    backbone = residual(kind)
    backbone.name = "backbone"
    head = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, name="d"), LAYERS[kind](name="bn"),
         keras.layers.Activation("silu", name="silu")], name="head_model",
    )  # fmt: skip
    outputs = keras.layers.Dense(2, name="out")(head(backbone(inputs)))
    return keras.Model(inputs, outputs, name="outer")


def two_towers(kind: str = "keras") -> Any:
    """Two inputs through one shared convolution and BatchNormalization; two outputs."""
    left, right = keras.Input((6, 6, 3), name="left"), keras.Input((6, 6, 3), name="right")
    conv, batch_norm = keras.layers.Conv2D(4, 3, name="conv"), LAYERS[kind](name="bn")
    relu = keras.layers.ReLU(name="relu")
    towers = [relu(batch_norm(conv(x))) for x in (left, right)]
    pooled = [keras.layers.GlobalAveragePooling2D()(tower) for tower in towers]
    joined = keras.layers.Concatenate()(pooled)
    outputs = {"class": keras.layers.Dense(2)(joined), "score": keras.layers.Dense(1)(joined)}
    return keras.Model({"left": left, "right": right}, outputs, name="towers")


def subclassed() -> Any:
    """A model that cannot be read."""

    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="own")
            self.bn = keras.layers.BatchNormalization(name="bn")

        def call(self, x: Any, training: bool | None = None) -> Any:
            return self.bn(x, training=training)

    model = Own()
    model(np.zeros((2, 3), "float32"))
    return model


def shake(model: Any, seed: int = 0, spread: float = 1.0) -> Any:
    """Give every variable values as after a training: nothing is 0 or 1 any more.

    The less the spread, the nearer to the values that a new layer has.
    """
    generator = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            for weight in layer.weights:
                drawn = generator.uniform(-1, 1, weight.shape) * spread
                positive = weight.name in ("gamma", "moving_variance")
                weight.assign(2**drawn if positive else drawn)
        elif layer.weights and not isinstance(layer, keras.Model):
            for weight in layer.weights:
                if weight.name == "bias":
                    weight.assign(generator.normal(size=weight.shape))
    return model


def snapshot(model: Any) -> tuple[Any, ...]:
    """Everything of a model that a tool could change without being asked."""
    flags = tuple((layer.name, layer.trainable) for layer in model._flatten_layers())
    values = tuple(np.array(keras.ops.convert_to_numpy(v)).tobytes() for v in model.variables)
    nodes = tuple(len(layer._inbound_nodes) for layer in model._flatten_layers())
    own = tuple(sorted(set(vars(layer)) & {"call", "_moments", "_normalize_batch"})
                for layer in model._flatten_layers())  # fmt: skip
    functions = tuple(
        id(getattr(model, name, None))
        for name in ("train_function", "test_function", "predict_function", "optimizer")
    )
    config = model.to_json() if model.__class__.__name__ != "Own" else ""
    return flags, values, nodes, own, functions, config


def predict(model: Any, x: Any) -> list[Any]:
    """Outputs in inference mode as NumPy arrays."""
    made = keras.tree.flatten(model(x, training=False))
    return [np.array(keras.ops.convert_to_numpy(y)) for y in made]


def inputs_for(model: Any, samples: int = 8, seed: int = 3) -> Any:
    """Normal numbers in the structure of the model's inputs."""
    generator = np.random.default_rng(seed)
    return keras.tree.map_structure(
        lambda t: generator.normal(1.0, 2.0, size=(samples, *t.shape[1:])).astype("float32"),
        model.inputs[0] if isinstance(model, keras.Sequential) else model.input,
    )
