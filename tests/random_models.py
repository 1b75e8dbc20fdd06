"""Random models: descriptions that hypothesis draws and shrinks, and the models they stand for.

Every description can be built. What does not fit (a window larger than its input, an addition of
different shapes) is read as the nearest thing that does, or passed over; so no example is thrown
away, and what is left of a description when a part is taken out is a description too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from hypothesis import strategies as st
from small_models import shake

import truenorm as tn

L = keras.layers
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
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    of: int = 0
    training: bool | None = None
    frozen: bool = False


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
LINEAR_KINDS = ("Dense", "Conv{}D", "DepthwiseConv{}D", "SeparableConv{}D", "Conv{}DTranspose")
ACTIVATION_KINDS = ("ReLU", "LeakyReLU", "PReLU", "ELU", "Activation")
WINDOW_KINDS = ("MaxPooling{}D", "AveragePooling{}D")
OTHER_KINDS = (
    "Dropout", "SpatialDropout{}D", "Flatten", "Reshape", "GlobalAveragePooling{}D",
    "GlobalMaxPooling{}D", "Cropping{}D", "ZeroPadding{}D", "UpSampling{}D", "LayerNormalization",
)  # fmt: skip
JOIN_KINDS = ("Add", "Concatenate", "+", "Multiply", "Average", "Maximum", "Subtract")
FUNCTIONS = {
    "relu": keras.ops.relu,
    "silu": keras.activations.silu,
    "tanh": keras.ops.tanh,
    "leaky_relu": keras.ops.leaky_relu,
    "half": lambda x: 0.5 * x,
    "softmax": keras.ops.softmax,
}

TRAINING = st.sampled_from([None] * 8 + [True, False])
RARELY = st.sampled_from([False] * 5 + [True])
OF = st.sampled_from([0] * 6 + [1, 2, 3])


def options(table: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Few at a time, so that the plain layers are not rare."""
    some = st.lists(st.sampled_from(list(table)), max_size=4, unique=True)
    drawn = some.flatmap(lambda keys: st.fixed_dictionaries({key: table[key] for key in keys}))
    return st.just(dict[str, Any]()) | drawn


linear = st.builds(
    Layer, one_of(*LINEAR_KINDS[:2], *LINEAR_KINDS), options(LINEAR), OF, frozen=RARELY
)
normalising = st.one_of(
    st.builds(Layer, st.just("keras"), options(NORMALISING), OF, TRAINING, RARELY),
    st.builds(Layer, st.just("truenorm"), options(OURS), OF, TRAINING, RARELY),
)
activation = st.one_of(
    st.builds(Layer, one_of(*ACTIVATION_KINDS), of=OF),
    st.builds(Function, one_of(*FUNCTIONS), OF),
)
other = st.one_of(
    st.builds(Layer, one_of(*WINDOW_KINDS), options(WINDOWS), OF),
    st.builds(Layer, one_of(*OTHER_KINDS), options({"first": st.booleans()}), OF, TRAINING),
)
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
    groups = st.one_of(
        in_line, single.map(lambda step: (step,)), in_line.flatmap(st.permutations), residual
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


# --- building ----------------------------------------------------------------------------------

Shape = tuple[int | None, ...]
LARGEST = 12


def build(description: Description) -> Any:
    """The model, with values as after a training."""
    keras.utils.clear_session(free_memory=False)  # the names of functions count from 1 again
    keras.utils.set_random_seed(description.seed)
    inputs = [
        keras.Input(shape, name=f"input{number}", dtype=_numbers(description.dtype))
        for number, shape in enumerate(description.inputs)
    ]
    if description.sequential:
        chain = _chain(description.steps, description.inputs[0], description.dtype)
        model = keras.Sequential([inputs[0], *chain], name="model")
    else:
        model = _model(description, inputs)
    return _trained(model, description.seed)


def _model(description: Description, inputs: list[Any]) -> Any:
    tensors, taken = _tensors(description.steps, inputs, description.dtype)
    wanted = [tensors[-1], *(_pick(tensors, i) for i in description.outputs)]
    if description.ends:
        wanted += [t for t in tensors if id(t) not in taken]
    given = {id(t) for t in inputs}
    wanted = [t for key, t in {id(t): t for t in wanted}.items() if key not in given]
    wanted = wanted or [L.Identity(name="nothing")(tensors[-1])]
    if not description.named:
        return keras.Model(inputs, wanted, name="model")
    named = {f"y{number}": t for number, t in enumerate(wanted)}
    return keras.Model({t.name: t for t in inputs}, named, name="model")


def _numbers(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _trained(model: Any, seed: int) -> Any:
    """Values as after a training; some scales are negative, which is rare but allowed."""
    generator = np.random.default_rng(seed)
    for variable in (v for layer in shake(model, seed)._flatten_layers() for v in layer.variables):
        if variable.name == "gamma" and seed % 2:
            sign = generator.choice([-1.0, 1.0, 1.0], variable.shape)
            variable.assign(sign * keras.ops.convert_to_numpy(variable))
        if variable.name == "alpha":  # of PReLU
            variable.assign(generator.uniform(0.1, 0.4, variable.shape))
    return model


def _tensors(steps: Sequence[Step], inputs: list[Any], dtype: str) -> tuple[list[Any], set[int]]:
    """All tensors that the steps make of the inputs, and which of them some step takes."""
    tensors, taken, layers = list(inputs), set[int](), list[tuple[Any, Shape]]()
    for number, step in enumerate(steps):
        sources = _sources(step, tensors, layers)
        source, written = sources[0], {}
        if isinstance(step, Join):
            made = _joined(step, sources, f"{step.kind.lower()}{number}", dtype)
        elif isinstance(step, Function):
            made = FUNCTIONS[step.kind](source)
        else:
            if isinstance(step, Again):
                layer = layers[step.layer % len(layers)][0] if layers else None
            else:
                layer = _layer(step, tuple(source.shape), number, dtype)
                written = {} if step.training is None else {"training": step.training}
            if layer is None:
                continue
            layers.append((layer, tuple(source.shape)))
            made = layer(source, **written)
        taken |= {id(source) for source in sources}
        tensors.append(made)
    return tensors, taken


def _pick(tensors: Sequence[Any], of: int) -> Any:
    return tensors[-1 - of % len(tensors)]


def _sources(step: Step, tensors: list[Any], layers: list[tuple[Any, Shape]]) -> list[Any]:
    """The tensors that a step takes: of those that fit, the one asked for."""
    if isinstance(step, Again) and layers:
        shape = layers[step.layer % len(layers)][1]
        return [_pick([t for t in tensors if tuple(t.shape) == shape], step.of)]
    if not isinstance(step, Join):
        return [_pick(tensors, step.of)]
    first = tensors[-1]
    joined = step.kind == "Concatenate" and first.shape[-1] <= LARGEST // 3
    ends = -1 if joined else None
    fitting = [t for t in tensors if t.shape[:ends] == first.shape[:ends]]
    return [first, *(_pick(fitting, of) for of in step.of)]


def _joined(step: Join, sources: list[Any], name: str, dtype: str) -> Any:
    if step.kind == "+":
        return sum(sources[1:], sources[0])
    if len(sources) == 1 or (step.kind == "Subtract" and len(sources) != 2):
        return sources[0] - 0.5
    return getattr(L, step.kind)(name=name, dtype=dtype)(sources)


def _chain(steps: Sequence[Step], shape: Sequence[int | None], dtype: str) -> list[Any]:
    """The layers of a Sequential model; what is no new layer is passed over."""
    chain, shape = [], (None, *shape)
    for number, step in enumerate(steps):
        if isinstance(step, Layer | Nested):
            layer = _layer(step, tuple(shape), number, dtype)
            if layer is not None:
                chain.append(layer)
                shape = layer.compute_output_shape(shape)
    return chain or [L.Identity(name="nothing")]


def _layer(step: Layer | Nested, shape: Shape, number: int, dtype: str) -> Any | None:
    if isinstance(step, Layer):
        return _plain_layer(step, shape, number, dtype)
    name = f"nested{number}"
    start = keras.Input(shape[1:], name="start", dtype=_numbers(dtype))
    if step.sequential:
        model = keras.Sequential([start, *_chain(step.steps, shape[1:], dtype)], name=name)
    else:
        tensors, _ = _tensors(step.steps, [start], dtype)
        last = tensors[-1] if len(tensors) > 1 else L.Identity()(start)
        model = keras.Model(start, last, name=name)
    if step.frozen:
        model.trainable = False
    return model


def _plain_layer(step: Layer, shape: Shape, number: int, dtype: str) -> Any | None:
    kind, given = step.kind, dict(step.options)
    rank = len(shape) - 2
    name = f"{kind.replace('{}', '').lower()}{number}"
    common: dict[str, Any] = {"name": name, "dtype": dtype}
    if step.frozen:
        common["trainable"] = False
    first = given.pop("first", False) and BACKEND != "tensorflow"
    first = first and (rank > 1 or (rank == 1 and ("Conv" in kind or "Pooling" in kind)))
    if "{}" in kind and not hasattr(L, kind.format(rank)):
        kind = "Dense" if "Conv" in kind else "Identity"
    if first and "{}" in kind:
        common["data_format"] = "channels_first"
    lengths = [d or 1 for d in (shape[2:] if first else shape[1:-1])]
    channels = (shape[1] if first else shape[-1]) or 1
    if "Conv" in kind:
        return _convolution(kind.format(rank), lengths, channels, given, common)
    if kind == "Dense":
        known = {k: given[k] for k in ("use_bias", "activation") if k in given}
        return L.Dense(_filters(given, channels), **known, **common)
    if kind in ("keras", "truenorm"):
        if "virtual_batch_size" in given:
            given.pop("renorm", None)
        make: Any = tn.BatchNormalization if kind == "truenorm" else L.BatchNormalization
        return make(**given, **common)
    if kind in WINDOW_KINDS:
        padding = "same" if min(lengths) < 2 or given.get("padding") != "valid" else "valid"
        strides = given.get("strides", 1)
        return getattr(L, kind.format(rank))(2, strides, padding, **common)
    return _other(kind.format(rank), shape, lengths, common)


def _filters(given: dict[str, Any], channels: int) -> int:
    wanted = given.pop("filters", 4)
    return channels if wanted == "as before" else wanted


def _convolution(
    kind: str, lengths: list[int], channels: int, given: dict[str, Any], common: dict[str, Any]
) -> Any:
    filters = _filters(given, channels)
    kernel, dilation = given.pop("kernel", 3), given.pop("dilation", 1)
    groups, multiplier = given.pop("groups", 1), given.pop("multiplier", 1)
    transposed = kind.endswith("Transpose")
    if dilation > 1:
        given["strides"] = 1
    if transposed:
        dilation = 1
        given["strides"] = given.get("strides", 1) if max(lengths) < LARGEST // 2 else 1
    if given.get("padding") == "causal" and kind != "Conv1D":
        given["padding"] = "same"
    if min(lengths) < (kernel - 1) * dilation + 1 and given.get("padding", "valid") == "valid":
        given["padding"] = "same"
    if kind[:4] == "Conv" and not transposed and filters % 2 == channels % 2 == 0:
        given["groups"] = groups
    if kind.startswith(("Depthwise", "Separable")):
        given["depth_multiplier"] = multiplier if channels * multiplier <= LARGEST else 1
    if not kind.startswith("Depthwise"):
        given["filters"] = filters
    return getattr(L, kind)(kernel_size=kernel, dilation_rate=dilation, **given, **common)


def _other(kind: str, shape: Shape, lengths: list[int], common: dict[str, Any]) -> Any | None:
    """Layers without variables, those that change the shape among them."""
    if kind == "Activation":
        return L.Activation("silu", **common)
    if "Dropout" in kind:
        return getattr(L, kind)(0.5, **common)
    if kind == "Reshape":
        numbers = shape[1:]
        return L.Reshape((*numbers[-1:], *numbers[:-1]), **common) if lengths else None
    if kind.startswith("Cropping"):
        return getattr(L, kind)(1, **common) if min(lengths) > 2 else None
    if kind.startswith(("ZeroPadding", "UpSampling")):
        return getattr(L, kind)(**common) if max(lengths) < LARGEST // 2 else None
    return getattr(L, kind)(**common)
