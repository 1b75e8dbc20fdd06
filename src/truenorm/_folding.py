"""Fold BatchNormalization into its neighbours, for inference."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from truenorm._absorption import (
    Affine,
    CannotBeAbsorbed,
    Taking,
    absorbed_before,
    absorbed_behind,
    affine_of,
    has_activation,
    values_of,
    why_unfit,
    with_map_before,
    with_map_behind,
)
from truenorm._graph import Call, is_batch_normalization
from truenorm._layer import BatchNormalization
from truenorm._moments import Array
from truenorm._probe import make_inputs, verify
from truenorm._rebuilding import Piece, copy_of, rebuild
from truenorm._records.rewrites import Change, Rewrite
from truenorm._records.sites import Left
from truenorm._sites import Where, apply, selector, site_calls


def fold(model: Any, *, where: Where = None, probe: Any = None) -> Rewrite:
    """Fold every BatchNormalization that can be folded into its neighbours, for inference.

    The new model computes what the old one computes with ``training=False``, with fewer layers;
    it is verified on a probe before it is returned. A BatchNormalization folds into what makes its
    input, if that is a convolution or dense layer without an activation, or else into all that
    takes its output: dense layers, convolutions without padding, other BatchNormalization. What
    commutes with a scale and a shift may be in between: dropout, pooling (maxima if no scale is
    negative), flattening, cropping, upsampling, concatenation; before it also an addition. All
    others stay, with their reason in the receipt; those of truenorm become Keras's, so that the new
    model loads without truenorm.

    Args:
        model: A functional or built Sequential ``keras.Model``, nested ones included. It is not
            changed.
        where: Which sites: a path pattern (``"block1/*"``), a predicate on a
            :class:`truenorm.Site`, or None for all. So some can be removed from a model that goes
            on training, which keeps its function; all others stay as they are.
        probe: Inputs to verify on, as the model takes them; made from the input specification
            (standard normal) where none are given.

    Returns:
        The folded model with its receipt and the largest differences of the outputs.

    Raises:
        ModelError: The model is subclassed, not built, or has no BatchNormalization.
        OptionError: ``where`` is something else.
        DataError: The model does not take ``probe``.
        VerificationError: The outputs would differ by more than rounding.

    Example:
        >>> import keras, truenorm as tn
        >>> model = keras.Sequential([
        ...     keras.Input((8,)), keras.layers.Dense(4), keras.layers.BatchNormalization()])
        >>> [type(layer).__name__ for layer in tn.fold(model).model.layers]
        ['Dense']

    Reference:
        Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", section 3.2, equation 14, arXiv:1712.05877.
    """
    folding = Folding(model, where)
    changed, left = apply(folding.site, model)
    new = rebuild(model, folding.edit())
    errors = verify(model, new, make_inputs(model) if probe is None else probe, "Folding")
    return Rewrite(new, "fold", changed, left, *errors)


def why_not_folded(model: Any) -> dict[str, str]:
    """Path of every site that stays, and why."""
    _, left = apply(Folding(model).site, model)
    return {site.path: site.reason for site in left}


class Folding:
    """What folding the sites of a model comes to; a site at a time, in the order of execution."""

    def __init__(self, model: Any, where: Where = None) -> None:
        wanted, sites = selector(where), site_calls(model)[0]
        self.fixed = {call.operation for call in sites if not wanted(call) or why_unfit(call)}
        self.free = {call.operation for call in sites} - self.fixed
        self.weights: dict[Any, list[Array]] = {}  # of convolution and dense layers, in float64
        self.maps: dict[Any, Affine] = {}  # of BatchNormalization that took others in, and stays
        self.gone: dict[Any, list[Piece]] = {}  # folded away, and what stays of it

    def site(self, call: Call) -> Change | Left:
        """Fold one site, or say why not."""
        layer = call.operation
        reason = "it is called more than once" if call.shared else why_unfit(call)
        if reason or layer in self.fixed:
            return Left(call.path, reason or "not selected")
        affine = self.maps.get(layer) or affine_of(layer)
        bare = [k for k in self.gone if not has_activation(k)]
        try:
            return self._fold(call, absorbed_before(call, affine, bare), "before")
        except CannotBeAbsorbed as reason:
            why_not_before = reason
        try:
            return self._fold(call, absorbed_behind(call, affine, self.fixed), "after")
        except CannotBeAbsorbed as why_not_behind:
            return Left(call.path, f"{why_not_before}; {why_not_behind}")

    def _fold(self, call: Call, takings: list[Taking], side: str) -> Change:
        for taker, affine in takings:
            self._take(taker.operation, affine, side)
        self.maps.pop(call.operation, None)
        self.gone[call.operation] = _own_activation(call.operation)
        takers = ", ".join(taker.label() for taker, _ in takings)
        return Change(call.path, f"folded into {takers} {side} it")

    def _take(self, layer: Any, affine: Affine, side: str) -> None:
        if is_batch_normalization(layer):
            self.maps[layer] = (self.maps.get(layer) or affine_of(layer)).after(affine)
            return
        values = self.weights.get(layer) or values_of(layer)
        take_in = with_map_behind if side == "before" else with_map_before
        self.weights[layer] = take_in(layer, values, affine)

    def edit(self) -> dict[Any, list[Piece]]:
        """The edit of the model; what stays is the least that Keras has, and loads without us."""
        ours = {k: affine_of(k) for k in self.free if type(k) is BatchNormalization}
        stays = {k: _scale_and_shift(k, affine) for k, affine in (ours | self.maps).items()}
        taken = {k: [copy_of(k, values, use_bias=True)] for k, values in self.weights.items()}
        return stays | taken | self.gone


def _scale_and_shift(layer: Any, affine: Affine) -> list[Piece]:
    """Keras's BatchNormalization as nothing but the map, and the activation that was inside.

    No layer of Keras's that scales and shifts is cheaper: the others take two passes.
    """
    new = keras.layers.BatchNormalization(
        axis=affine.axis, epsilon=0.0, name=layer.name, dtype=layer.dtype_policy
    )
    zeros, ones = np.zeros_like(affine.shift), np.ones_like(affine.scale)
    values = [affine.scale, affine.shift, zeros, ones]
    return [Piece(new, layer, values), *_own_activation(layer)]


def _own_activation(layer: Any) -> list[Piece]:
    """Of a layer that goes: its own activation, if it had one, as a layer."""
    if not has_activation(layer):
        return []
    name, dtype = f"{layer.name}_activation", layer.dtype_policy
    return [Piece(keras.layers.Activation(layer.activation, name=name, dtype=dtype))]
