"""The models that random descriptions stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from random_descriptions import (
    BACKEND,
    FUNCTIONS,
    WINDOW_KINDS,
    Again,
    Description,
    Function,
    Join,
    Layer,
    Nested,
    Step,
)
from small_models import shake

import truenorm as tn

L = keras.layers
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
                if isinstance(step, Layer) and step.masked and "axis" not in step.options:
                    written["mask"] = keras.ops.any(source > -1.0, axis=-1)
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
        return _wrapped(step, shape, number, dtype)
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


def _wrapped(step: Layer, shape: Shape, number: int, dtype: str) -> Any | None:
    """The layer, in the wrapper that is wanted, where that takes it."""
    common: dict[str, Any] = {"name": f"within{number}", "dtype": dtype}
    steps = step.within == "TimeDistributed" and len(shape) > 2
    layer = _plain_layer(step, (shape[0], *shape[2:]) if steps else shape, number, dtype)
    if layer is not None and steps:
        return L.TimeDistributed(layer, **common)
    if step.within == "SpectralNormalization" and _has_kernel(layer):
        return L.SpectralNormalization(layer, **common)
    return layer


def _has_kernel(layer: Any) -> bool:
    kind = type(layer).__name__
    return kind in ("Dense", "EinsumDense") or ("Conv" in kind and "Separable" not in kind)


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
    if kind == "EinsumDense":
        return _einsum(shape, _filters(given, channels), given, common)
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


def _einsum(shape: Shape, filters: int, given: dict[str, Any], common: dict[str, Any]) -> Any:
    """Over the last axis; one kernel for all places, or one for each along the first axis."""
    along, activation = given.get("along"), given.get("activation")
    letters = "abcdefg"[: len(shape)]
    first, last = letters[1], letters[-1]
    each = along == "first" and len(shape) > 2
    kernel = f"{first}{last}z" if each else f"{last}z"
    both = along == "two biases" and len(shape) > 2
    bias = None if along == "no bias" else f"{first}z" if both else "z"
    return L.EinsumDense(
        f"{letters},{kernel}->{letters[:-1]}z", (*shape[1:-1], filters),
        bias_axes=bias, activation=activation, **common,
    )  # fmt: skip


def _filters(given: dict[str, Any], channels: int) -> int:
    wanted = given.pop("filters", 4)
    return channels if wanted == "as before" else wanted


def _convolution(
    kind: str, lengths: list[int], channels: int, given: dict[str, Any], common: dict[str, Any]
) -> Any:
    filters, _ = _filters(given, channels), given.pop("along", None)
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
    if kind == "Permute":
        return L.Permute(range(len(shape) - 1, 0, -1), **common)
    if kind == "Rescaling":
        return L.Rescaling(-0.5, 0.25, **common)
    if kind.startswith("Cropping"):
        return getattr(L, kind)(1, **common) if min(lengths) > 2 else None
    if kind.startswith(("ZeroPadding", "UpSampling")):
        return getattr(L, kind)(**common) if max(lengths) < LARGEST // 2 else None
    return getattr(L, kind)(**common)
