"""Descriptions of random models, which hypothesis draws and shrinks; ``random_models`` builds them.

Every description can be built. What does not fit (a window larger than its input, an addition of
different shapes) is read as the nearest thing that does, or passed over; so no example is thrown
away, and what is left of a description when a part is taken out is a description too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import keras
from hypothesis import strategies as st

BACKEND = keras.config.backend()


@dataclass(frozen=True)
class Layer:
    """A new layer, called once.

    Args:
        kind: A key of the tables below.
        options: Of its constructor.
        of: Which tensor it takes: 0 the latest, 1 the one before, and so on, round and round.
        training: What is written into its call.
        frozen: Whether it is not trainable.
        within: The wrapper that it is in, where that takes it.
        masked: Whether its call gets a mask (a BatchNormalization's in a functional model).
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    of: int = 0
    training: bool | None = None
    frozen: bool = False
    within: str | None = None
    masked: bool = False


@dataclass(frozen=True)
class Function:
    """A function that is no layer."""

    kind: str
    of: int = 0


@dataclass(frozen=True)
class Join:
    """One tensor of several: those asked for, where their shapes go together."""

    kind: str
    of: tuple[int, ...]


@dataclass(frozen=True)
class Again:
    """Another call of a layer that has been called, on any tensor of the shape that it takes."""

    layer: int
    of: int = 0


@dataclass(frozen=True)
class Nested:
    """A model as a layer."""

    steps: tuple[Step, ...]
    sequential: bool = False
    of: int = 0
    training: bool | None = None
    frozen: bool = False


Step = Layer | Function | Join | Again | Nested


@dataclass(frozen=True)
class Description:
    """A model.

    Args:
        steps: What is done, one after the other.
        inputs: The shapes of its inputs, without the batch.
        outputs: Tensors that are outputs besides the latest one.
        ends: Whether each tensor that nothing takes is an output too.
        named: Whether inputs and outputs are dicts.
        sequential: Whether it is a Sequential model, of those steps that such a model can have.
        dtype: The dtype policy of all layers.
        seed: Of all values.
    """

    steps: tuple[Step, ...]
    inputs: tuple[tuple[int, ...], ...] = ((4,),)
    outputs: tuple[int, ...] = ()
    ends: bool = False
    named: bool = False
    sequential: bool = False
    dtype: str = "float32"
    seed: int = 0


# --- what is drawn -----------------------------------------------------------------------------


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


WINDOWS = {
    "kernel": one_of(1, 2, 3),
    "padding": one_of("valid", "same", "causal"),
    "strides": one_of(1, 2),
    "dilation": one_of(1, 2),
    "first": st.booleans(),
}
LINEAR = {
    **WINDOWS,
    "filters": one_of(4, 2, 6),
    "groups": one_of(1, 2),
    "multiplier": one_of(1, 2),
    "use_bias": st.just(False),
    "activation": one_of("relu", "silu"),
    "along": one_of("first", "no bias", "two biases"),
}
NORMALISING = {
    "axis": st.just(1),
    "scale": st.just(False),
    "center": st.just(False),
    "epsilon": st.just(1e-2),
    "renorm": st.just(True),
}
OURS = {
    **NORMALISING,
    "momentum": st.none(),
    "activation": one_of("relu", "silu"),
    "virtual_batch_size": st.just(2),
    "freeze": one_of("all", "statistics", "affine"),
    "bessel_correction": st.just(True),
}
LINEAR_KINDS = (
    "Dense", "Conv{}D", "DepthwiseConv{}D", "SeparableConv{}D", "Conv{}DTranspose", "EinsumDense",
)  # fmt: skip
ACTIVATION_KINDS = ("ReLU", "LeakyReLU", "PReLU", "ELU", "Activation")
WINDOW_KINDS = ("MaxPooling{}D", "AveragePooling{}D")
OTHER_KINDS = (
    "Dropout", "SpatialDropout{}D", "Flatten", "Reshape", "GlobalAveragePooling{}D",
    "GlobalMaxPooling{}D", "Cropping{}D", "ZeroPadding{}D", "UpSampling{}D", "LayerNormalization",
    "Permute", "Rescaling",
)  # fmt: skip
JOIN_KINDS = ("Add", "Concatenate", "+", "Multiply", "Average", "Maximum", "Subtract")
FUNCTIONS = {
    "relu": keras.ops.relu,
    "silu": keras.activations.silu,
    "tanh": keras.ops.tanh,
    "leaky_relu": keras.ops.leaky_relu,
    "softmax": keras.ops.softmax,
}


def _pooled(x: Any) -> Any:
    return keras.ops.average_pool(x, 2, 1, "same", data_format="channels_last")


def _first_axis(reduce: Any, **options: Any) -> Any:
    """Over the axis behind that of the batch, where that is not the only one."""
    return lambda x: reduce(x, axis=1, **options) if len(x.shape) > 2 else 0.5 * x


COMMUTING = {
    "half": lambda x: 0.5 * x,
    "less": lambda x: 1.0 - x / 2,
    "negative": lambda x: -x,
    "mean": _first_axis(keras.ops.mean),
    "sum": _first_axis(keras.ops.sum, keepdims=True),
    "max": _first_axis(keras.ops.max),
    "last": lambda x: x[:, -1] if len(x.shape) > 2 else x * 2,
    "some": lambda x: x[..., : max(1, x.shape[-1] // 2)],
    "flip": lambda x: keras.ops.flip(x, axis=1),
    "transpose": lambda x: keras.ops.transpose(x, (0, *range(len(x.shape) - 1, 0, -1))),
    "swapaxes": lambda x: keras.ops.swapaxes(x, 1, -1),
    "moveaxis": lambda x: keras.ops.moveaxis(x, -1, 1),
    "reshape": lambda x: keras.ops.reshape(x, (-1, *x.shape[2:])) if len(x.shape) > 2 else x * 2,
    "merge": lambda x: keras.ops.reshape(x, (-1, math.prod(x.shape[1:]))),
    "expand": lambda x: keras.ops.expand_dims(x, 1) if len(x.shape) < 5 else x * 2,
    "tile": lambda x: keras.ops.tile(x, (1,) * (len(x.shape) - 1) + (2,)),
    "pool": lambda x: _pooled(x) if 2 < len(x.shape) < 5 else x * 2,
}
FUNCTIONS |= COMMUTING

TRAINING = st.sampled_from([None] * 8 + [True, False])
RARELY = st.sampled_from([False] * 5 + [True])
OF = st.sampled_from([0] * 6 + [1, 2, 3])
WITHIN = st.sampled_from([None] * 6 + ["TimeDistributed", "SpectralNormalization"])
WITHIN_STEPS = st.sampled_from([None] * 6 + ["TimeDistributed"])


def options(table: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Few at a time, so that the plain layers are not rare."""
    some = st.lists(st.sampled_from(list(table)), max_size=4, unique=True)
    drawn = some.flatmap(lambda keys: st.fixed_dictionaries({key: table[key] for key in keys}))
    return st.just(dict[str, Any]()) | drawn


linear = st.builds(
    Layer,
    one_of(*LINEAR_KINDS[:2], *LINEAR_KINDS),
    options(LINEAR),
    OF,
    frozen=RARELY,
    within=WITHIN,
)
normalising = st.one_of(
    *(
        st.builds(Layer, st.just(kind), options(table), OF, TRAINING, RARELY, WITHIN_STEPS, RARELY)
        for kind, table in (("keras", NORMALISING), ("truenorm", OURS))
    )
)
activation = st.one_of(
    st.builds(Layer, one_of(*ACTIVATION_KINDS), of=OF),
    st.builds(Function, one_of(*FUNCTIONS), OF),
)
other = st.one_of(
    st.builds(Layer, one_of(*WINDOW_KINDS), options(WINDOWS), OF),
    st.builds(Layer, one_of(*OTHER_KINDS), options({"first": st.booleans()}), OF, TRAINING),
)
between = st.builds(Function, one_of(*COMMUTING), OF)
join = st.builds(Join, one_of(*JOIN_KINDS), st.lists(st.integers(0, 5), max_size=2).map(tuple))
again = st.builds(Again, st.integers(0, 7), OF)


def _one_after_another(
    linear: Layer, normalising: Layer, activation: Layer | Function
) -> tuple[Step, ...]:
    """The usual three; the axis is that of the channels."""
    given = {k: v for k, v in normalising.options.items() if k != "axis"}
    if linear.options.get("first") and BACKEND != "tensorflow":
        given["axis"] = 1
    return (
        replace(linear, of=0),
        replace(normalising, options=given, of=0),
        replace(activation, of=0),
    )


in_line = st.builds(_one_after_another, linear, normalising, activation)
residual = st.builds(
    lambda kind, norm, act: (
        Layer(kind, {"filters": "as before", "padding": "same"}), norm, Join("Add", (2,)), act
    ),
    one_of("Dense", "Conv{}D"), normalising, activation,
)  # fmt: skip


def steps(depth: int = 2) -> st.SearchStrategy[tuple[Step, ...]]:
    """At most twelve or so, in groups: the usual ones more often than chance would make them."""
    below = st.deferred(lambda: steps(depth - 1)) if depth else st.nothing()
    nested = st.builds(Nested, below, st.booleans(), OF, TRAINING, RARELY)
    single = st.one_of(linear, normalising, normalising, activation, other, join, again, nested)
    apart = st.builds(lambda *of: of, linear, between, normalising, activation)
    groups = st.one_of(
        in_line,
        apart,
        apart.map(lambda of: of[::-1]),
        single.map(lambda step: (step,)),
        in_line.flatmap(st.permutations),
        residual,
    )
    return st.lists(groups, min_size=1 + (depth == 2), max_size=8 if depth == 2 else 3).map(
        lambda found: tuple(step for group in found for step in group)
    )


SHAPES = [(4,), (6, 4), (6, 6, 4), (5, 2), (5, 5, 2), (4, 4, 4, 2)]
DTYPES = ["float32"] * 12 + ["mixed_bfloat16", "mixed_float16"] + ["float64"] * (BACKEND != "jax")

descriptions = st.builds(
    Description,
    steps(),
    st.lists(st.sampled_from(SHAPES[:4] * 4 + SHAPES), min_size=1, max_size=2).map(tuple),
    st.lists(st.integers(0, 6), max_size=2).map(tuple),
    st.booleans(),
    st.booleans(),
    RARELY,
    st.sampled_from(DTYPES),
    st.integers(0, 3),
)
