"""What can stand in the place of a BatchNormalization: Keras's or truenorm's, or another layer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import keras
import numpy as np

from truenorm._checks import check_integer, meant
from truenorm._errors import OptionError
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._layer.frozen_affine import FrozenAffine
from truenorm._model.edit import Piece, from_config
from truenorm._model.rebuild import build_like
from truenorm._model.sites import Spot, batch_normalizations, channel_axis, is_own_class, spots
from truenorm._model.values import as_float64, numbers
from truenorm._records.tables import counted
from truenorm._rewrites.passing import why_not_behind

To = Literal["truenorm", "keras", "group", "layer", "affine"]

GROUPS = 32
"""As in the paper, and Keras's default."""

_CLASSES: dict[str, Any] = {
    "truenorm": BatchNormalization,
    "keras": keras.layers.BatchNormalization,
    "group": keras.layers.GroupNormalization,
    "layer": keras.layers.LayerNormalization,
    "affine": FrozenAffine,
}
_OF_EVERY_LAYER = ("name", "trainable", "dtype")
_KEPT = ("axis", "epsilon", "center", "scale", "activation", "freeze", "kwargs")
"""Arguments that say what a layer computes, or that other tools change."""

_WITHIN_A_SAMPLE = (
    "The new model computes something else: each sample is normalised by its own mean and variance "
    "{}, in training and in inference alike. gamma and beta are carried over, the moving "
    "statistics are gone: train the new model."
)


@dataclass(frozen=True)
class Target:
    """What comes in the place of each BatchNormalization.

    Args:
        name: What the receipt is headed with.
        what: What it says of a site.
        why_left: Why a site stays as it is; None if it does not.
        piece: What comes in the place of a layer.
        note: What is said of a model that computes something else; None: it must compute the same.
        bare: Whether a sum and an activation inside the old layer have to stand behind the new one.
    """

    name: str
    what: str
    why_left: Callable[[Spot], str | None]
    piece: Callable[[Any], Piece]
    note: str | None = None
    bare: bool = True


def target_of(
    model: Any,
    to: Any,
    groups: Any,
    options: Mapping[str, Any],
    rectifying: Collection[Any] = (),
) -> Target:
    """The target that these arguments of ``replace`` name, if the model can have it.

    Layers that are ``rectifying`` get a ReLU of their own.
    """
    if to not in get_args(To):
        raise OptionError(
            "There is no such layer to replace by",
            where="to",
            expected=" or ".join(map(repr, get_args(To))),
            received=repr(to),
            remedy=meant(to, get_args(To)),
        )
    if groups is not None and to != "group":
        raise OptionError(
            "Only GroupNormalization has groups",
            where="groups",
            expected="to='group', or no groups",
            received=f"to={to!r}, groups={groups!r}",
        )
    _check_options(to, options)
    if to in ("truenorm", "keras"):
        return _batch_normalization(to, options, rectifying)
    why_left = partial(_why_not_converted, to)
    if to == "affine":
        what = "now a frozen scale and shift, made of its moving statistics, gamma and beta"
        return Target(to, what, why_left, _affine)
    if to == "group":
        groups = _check_groups(model, groups)
        of = counted(groups, "group")
        within = f"within {of} of channels, over all positions"
        name, what = f"group, groups={groups}", f"now GroupNormalization of {of}"
        piece, note = partial(_converted, to, groups=groups), _WITHIN_A_SAMPLE.format(within)
        return Target(name, what, why_left, piece, note)
    note = _WITHIN_A_SAMPLE.format("over the channels, each position by itself")
    what = "now LayerNormalization over the channels"
    return Target(to, what, why_left, partial(_converted, to), note)


# --- another BatchNormalization ----------------------------------------------------------------


def _batch_normalization(
    to: str, options: Mapping[str, Any], rectifying: Collection[Any]
) -> Target:
    said = "".join(f", {name}={value!r}" for name, value in options.items())
    return Target(
        f"{to}{said}",
        f"now {to}'s BatchNormalization{said}",
        partial(_why_not_replaced, to, options, rectifying),
        partial(_replaced, to, options, rectifying),
        bare=to == "keras",
    )


def _check_options(to: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the class does not have, or that would change the function."""
    kind = _CLASSES[to]
    own = inspect.signature(kind).parameters if to in ("truenorm", "keras") else {}
    of_weights = ("_initializer", "_regularizer", "_constraint")
    known = [name for name in own if name not in _KEPT and not name.endswith(of_weights)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(
            f"{unknown[0]} is not an option that layers can be given when they are replaced",
            where=f"replace(model, to={to!r})",
            expected=", ".join(known) or "no option of the layer",
            received=f"{unknown[0]}={options[unknown[0]]!r}",
            remedy=meant(unknown[0], [*known, "to", "groups", "fuse", "probe", "progress"]),
        )
    if not options:
        return
    try:
        kind(name="probe", **options)
    except OptionError:
        raise
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"{kind.__name__} does not take these options",
            where=f"replace(model, to={to!r})",
            received=str(error).strip().splitlines()[0],
        ) from error


def _why_not_replaced(
    to: str, options: Mapping[str, Any], rectifying: Collection[Any], spot: Spot
) -> str | None:
    layer = spot.layer
    has_them = all(getattr(layer, name, None) == value for name, value in options.items())
    if type(layer) is _CLASSES[to] and has_them and layer not in rectifying:
        return f"it is {to}'s already" + (", with these options" if options else "")
    if is_own_class(layer):
        return f"its class {type(layer).__name__} is a custom subclass"
    domains, affine = (getattr(layer, name, None) for name in ("domains", "domain_affine"))
    if domains is not None and options.get("domains", domains) != domains:
        return f"it has {domains} domains already"
    if affine and not options.get("domain_affine", affine):
        return "its domains have gamma and beta of their own"
    if to != "keras":
        return None
    config = layer.get_config()
    if spot.call is not None:  # there it goes behind the layer
        config.pop("activation", None)
    option = _only_ours({**config, **options})
    return f"Keras's layer has nothing like its {option}" if option else why_not_behind(layer)


def _replaced(
    to: str, options: Mapping[str, Any], rectifying: Collection[Any], layer: Any
) -> Piece:
    own = {"activation": keras.activations.relu} if layer in rectifying else {}
    new = from_config(layer, _CLASSES[to], **options, **own)
    loses = isinstance(getattr(layer, "activation", None), keras.Layer) and to == "keras"
    return Piece(new, layer, _values(layer, new) if options or loses else None)


def _values(layer: Any, new: Any) -> list[Any]:
    """What the new layer's variables are: the old ones of the same name, where there are.

    The statistics that only renorm has begin at the moving ones.
    """
    build_like(layer, new)
    deviation = np.sqrt(np.maximum(as_float64(layer.moving_variance), 0) + layer.epsilon)
    known: dict[str, Any] = {
        "renorm_mean": as_float64(layer.moving_mean),
        "renorm_stddev": deviation,
        "moving_stddev": deviation,
        **{variable.name: numbers(variable) for variable in layer.variables},
    }
    return [
        np.broadcast_to(known.get(one.name, numbers(one)), tuple(one.shape))
        for one in new.variables
    ]


def _only_ours(config: Mapping[str, Any]) -> str | None:
    """An option in use that Keras's layer does not have, on this backend; None if there is none."""
    known = inspect.signature(keras.layers.BatchNormalization).parameters
    for option, value in config.items():
        if option not in known and option not in _OF_EVERY_LAYER:
            return option
        if option == "momentum" and value is None:
            return option
        if option == "synchronized" and value and keras.config.backend() != "tensorflow":
            return option
    return None


# --- another layer -----------------------------------------------------------------------------


def _why_not_converted(to: str, spot: Spot) -> str | None:
    """A mask decides nothing where each position is normalised by itself, or none is."""
    layer, call = spot.layer, spot.call
    if is_own_class(layer):
        return f"its class {type(layer).__name__} is a custom subclass"
    if getattr(layer, "domains", None) is not None:
        return "it has several domains"
    if call is None and getattr(layer, "activation", None) is not None:
        return "it has an activation of its own inside, and no graph shows where that can go"
    if to == "group" and call is not None and "mask" in call.extras:
        return "it is called with a mask, which GroupNormalization does not take"
    if to == "layer" and channel_axis(layer) != layer.input_spec.ndim - 1:
        return "its channels are not on the last axis, as LayerNormalization needs it on PyTorch"
    if int(layer.moving_mean.shape[0]) == 1 and (to == "layer" or layer.input_spec.ndim == 2):
        return "it has one channel, which would be constant"
    return why_not_behind(layer)


def _converted(to: str, layer: Any, **changes: Any) -> Piece:
    """A layer that normalises within a sample, with gamma and beta."""
    axis, last = channel_axis(layer), layer.input_spec.ndim - 1
    new = from_config(layer, _CLASSES[to], axis=-1 if axis == last else axis, **changes)
    return Piece(new, layer, [w for w in (layer.gamma, layer.beta) if w is not None])


def _affine(layer: Any) -> Piece:
    new = FrozenAffine(channel_axis(layer), name=layer.name, dtype=layer.dtype_policy)
    mean = as_float64(layer.moving_mean)
    with np.errstate(invalid="ignore", divide="ignore"):  # stored variances may be anything
        scale = 1 / np.sqrt(as_float64(layer.moving_variance) + layer.epsilon)
    scale = scale if layer.gamma is None else scale * as_float64(layer.gamma)
    shift = np.zeros_like(mean) if layer.beta is None else as_float64(layer.beta)
    return Piece(new, layer, [mean, scale, shift])


def _check_groups(model: Any, groups: Any) -> int:
    """Refuse a number of groups that some layer's channels cannot be divided into.

    Where none is given it is the largest that does it for all layers, up to the paper's. Layers
    that stay as they are have no say.
    """
    most = GROUPS if groups is None else check_integer("groups", groups)
    stay = {spot.layer for spot in spots(model) if _why_not_converted("group", spot) is not None}
    layers = {k: path for k, path in batch_normalizations(model).items() if k not in stay}
    sizes = {layer: int(layer.moving_mean.shape[0]) for layer in layers}
    common = math.gcd(*sizes.values())
    flat = {n for layer, n in sizes.items() if layer.input_spec.ndim == 2}
    fits = [n for n in range(1, most + 1) if common % n == 0 and n not in flat]
    if groups in (None, fits[-1]):
        return fits[-1]
    layer = next(k for k, n in sizes.items() if n % most or (most == n and k.input_spec.ndim == 2))
    alone = sizes[layer] % most == 0
    raise OptionError(
        "A group of one value has nothing to be normalised with"
        if alone
        else "This number of groups does not divide the channels",
        where=layers[layer],
        expected=f"a divisor of its {sizes[layer]} channels"
        + (", and a smaller one: its input has no other axis" if alone else ""),
        received=f"groups={most}",
        remedy=f"groups={fits[-1]} divides those of every layer",
    )
