"""Fold BatchNormalization into its neighbours, for inference."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import keras
import numpy as np

from truenorm._checks import known_options
from truenorm._keras_internals import layers_in
from truenorm._layer.batch_normalization import BatchNormalization
from truenorm._model.domains import of_domain
from truenorm._model.edit import Piece, copy_of
from truenorm._model.graph import Call, Graph, is_batch_normalization, nearby, read_graph
from truenorm._model.progress import Wanted, shown
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import Where, check_all, hidden, selector, with_kinds
from truenorm._model.state import learns
from truenorm._model.trainer import compile_without_state
from truenorm._model.values import as_float64
from truenorm._records.moments import Array
from truenorm._records.rewrite import Change, Left, Rewrite
from truenorm._rewrites.absorb import (
    CannotBeAbsorbed,
    Taking,
    absorbed_before,
    absorbed_behind,
    why_unfit,
)
from truenorm._rewrites.affine import (
    Affine,
    affine_of,
    values_of,
    variables_of,
    with_map_before,
    with_map_behind,
)
from truenorm._rewrites.unfuse import behind, names_in
from truenorm._rewrites.verify import verify
from truenorm._rewrites.wrappers import (
    innermost,
    inside,
    normalizes,
    normalizes_its_kernel,
    site_of,
    wrapped_like,
)

L = keras.layers


@known_options
def fold(
    model: Any,
    *,
    where: Where = None,
    probe: Any = None,
    progress: Wanted = None,
    domain: int | None = None,
) -> Rewrite:
    """Fold every BatchNormalization that can be folded into its neighbours, for inference.

    The new model computes what the old one computes with ``training=False``, with fewer layers;
    it is verified on a probe before it is returned. A BatchNormalization folds into what makes its
    input, if that is a convolution or dense layer (``EinsumDense`` too) without an activation, or
    else into all that takes its output: dense layers, convolutions without padding, other
    BatchNormalization. Any of these may be inside a ``TimeDistributed``, and a kernel inside a
    ``SpectralNormalization``, which is left out then: it does nothing in inference. A mask does not
    matter either.

    What commutes with a scale and a shift may be in between: dropout, pooling (maxima if no scale
    is negative), cropping, upsampling, concatenation, arithmetic with constants, means and sums
    over other axes, whatever transposes, reshapes or selects as long as each channel stays one;
    before it also a sum or an average. For each it is one whether a layer or a function of
    ``keras.ops`` does it.

    All others stay, with their reason in the receipt; those of truenorm become Keras's, so that the
    new model loads without truenorm. (Not so those that are called in training mode, are inside
    another wrapper, or have statistics that are not finite: these stay as they are.)

    The new model is for inference. If the old one was compiled, so is the new one, with the same
    loss and metrics for ``evaluate``, but with plain SGD, so that its file has no state of an
    optimizer; whoever trains it on compiles it first. (With ``where`` the optimizer is as it was.)

    Args:
        model: A functional or built Sequential ``keras.Model``, nested ones included. It is not
            changed.
        where: Which sites: a path pattern (``"block1/*"``), a predicate on a
            :class:`truenorm.Site`, or None for all. So some can be removed from a model that goes
            on training, which keeps its function; every BatchNormalization that stays is left as
            it is.
        probe: Inputs to verify on, as the model takes them, or data in batches, of which the first
            is taken; made from the input specification (standard normal) where none are given.
        progress: Whether to show what is going on, on the standard error stream. None: on a
            terminal and in a notebook.
        domain: Of a model whose layers have several (:func:`truenorm.domain`): the one that the new
            model is for.

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
    graph = read_graph(model if domain is None else of_domain(model, domain))
    with shown(progress, "folding") as line:
        folding = Folding(graph, where)
        changed, left = folding.receipt()
        edit = folding.edit()
        line.step("making the new model")
        new = rebuild(graph.model, edit)
        if where is None:
            compile_without_state(new)
        proof = verify(graph, edit, folding.between, new, probe, "Folding", line)
    return Rewrite(new, "fold", changed, left, *proof)


def why_not_folded(model: Any, where: Where = None) -> dict[str, str]:
    """Path of every site that stays, and why."""
    _, left = Folding(read_graph(model), where).receipt()
    return {site.path: site.reason for site in left}


def why_not_folded_alone(graph: Graph) -> dict[str, str]:
    """The same of each site as if it were the only one that is meant."""
    folding = Folding(graph, "*")
    results = [folding.alone(call) for call in folding.sites]
    return {one.path: one.reason for one in results if isinstance(one, Left)}


class Folding:
    """What folding the sites of a model comes to; a site at a time, in the order of execution.

    A site is known by the operation that is called: the layer, or what calls it for each step.
    """

    def __init__(self, graph: Graph, where: Where = None) -> None:
        wanted = selector(where)
        self.graph = graph
        self.sites = [call for call in graph.calls if normalizes(call)]
        layers = {call.operation for call in self.sites}
        unfit = [call for call in self.sites if not wanted(site_of(call)) or why_unfit(call)]
        self.fixed = {call.operation for call in unfit}
        self.whole = where is None
        # In a part of a model none takes another one in: it would no longer be what it was.
        self.closed = self.fixed if self.whole else layers
        self.free = layers - self.fixed
        self.adding = {call.operation for call in self.sites if "add" in call.extras}
        self._begin()

    def _begin(self) -> None:
        """Nothing is folded yet."""
        self.weights: dict[Any, list[Array]] = {}  # of convolution and dense layers, in float64
        self.learning: set[Any] = set()  # those of them that take in a shift that learns
        self.maps: dict[Any, Affine] = {}  # of BatchNormalization that took others in, and stays
        self.gone: dict[Any, list[Piece]] = {}  # folded away, and what stays of it
        self.between: set[Call] = set()  # whose outputs are meant to be other ones

    def receipt(self) -> tuple[tuple[Change, ...], tuple[Left, ...]]:
        """Fold every site."""
        paths = {site_of(call).path for call in self.sites}
        others = [left for left in hidden(self.graph) if left.path not in paths]
        changed, left = check_all(self.site, self.sites, others)
        labels = self.graph.labels
        return with_kinds(labels, changed), with_kinds(labels, left)

    @cached_property
    def names(self) -> set[str]:
        """The names that are taken."""
        return names_in(self.graph.model)

    def alone(self, call: Call) -> Change | Left:
        """Fold one site and no other."""
        self._begin()
        return self.site(call)

    def site(self, call: Call) -> Change | Left:
        """Fold one site, or say why not."""
        path, operation = site_of(call).path, call.operation
        reason = "it is called more than once" if call.shared else why_unfit(call)
        if reason or operation in self.fixed:
            return Left(path, reason or "not selected")
        affine = inside(call).outward(self._map(operation))
        bare = [k for k, chain in self.gone.items() if not chain]
        try:
            return self._fold(call, absorbed_before(call, affine, bare), "before")
        except CannotBeAbsorbed as reason:
            why_not_before = reason
        try:
            return self._fold(call, absorbed_behind(call, affine, self.closed), "after")
        except CannotBeAbsorbed as why_not_behind:
            return Left(path, f"{why_not_before}; {why_not_behind}")

    def _map(self, operation: Any) -> Affine:
        """What a BatchNormalization does by now."""
        return self.maps.get(operation) or affine_of(innermost(operation))

    def _fold(self, call: Call, takings: list[Taking], side: str) -> Change:
        dtype, layer = call.operation.compute_dtype, inside(call).layer
        for taker, _ in takings:
            self._require_fit(taker, dtype)
        for taker, affine in takings:
            self._take(taker.operation, affine, side)
            if learns(layer.beta):
                self.learning.add(taker.operation)
        self.between |= _between(call, takings, side)
        self.maps.pop(call.operation, None)
        self.gone[call.operation] = self._behind(layer)
        takers = ", ".join(taker.label() for taker, _ in takings)
        what = f"folded into {takers} {side} it"
        return Change(site_of(call).path, what + _no_longer_learns(layer, takings))

    def _require_fit(self, taker: Call, dtype: str) -> None:
        operation = taker.operation
        if {k.compute_dtype for k in layers_in(operation)} != {dtype}:
            raise CannotBeAbsorbed(f"{taker.label()} does not compute in {dtype}, as it does")
        if normalizes_its_kernel(operation) and not self.whole:
            raise CannotBeAbsorbed(f"{taker.label()} normalises its kernel in training")

    def _take(self, operation: Any, affine: Affine, side: str) -> None:
        layer = innermost(operation)
        if is_batch_normalization(layer):
            self.maps[operation] = self._map(operation).after(affine)
            return
        values = self.weights.get(operation) or values_of(layer)
        take_in = with_map_behind if side == "before" else with_map_before
        self.weights[operation] = take_in(layer, values, affine)

    def edit(self) -> dict[Any, list[Piece]]:
        """The edit of the model."""
        alone = self.free - self.maps.keys() - self.gone.keys() if self.whole else set()
        chains = {k: self._taker(k, values) for k, values in self.weights.items()}
        chains |= {k: self._merged(innermost(k), affine) for k, affine in self.maps.items()}
        ours = {k: innermost(k) for k in alone if type(innermost(k)) is BatchNormalization}
        chains |= {k: self._plain(layer) for k, layer in ours.items()}
        wrapped = {k: [wrapped_like(k, p), *rest] for k, (p, *rest) in chains.items()}
        return wrapped | self.gone

    def _taker(self, operation: Any, values: list[Array]) -> list[Piece]:
        """A convolution or dense layer that has taken others in."""
        layer = innermost(operation)
        variables, changes = variables_of(layer, values)
        frozen = () if layer.bias is not None or operation in self.learning else ("bias",)
        return [copy_of(layer, variables, frozen=frozen, **changes)]

    def _plain(self, layer: Any) -> list[Piece]:
        """Keras's layer in the place of ours, and what it did behind its normalisation."""
        known = inspect.signature(keras.layers.BatchNormalization).parameters
        config = {k: v for k, v in layer.get_config().items() if k in known}
        config |= {"renorm": False, "renorm_clipping": None, "synchronized": False}
        config |= {"momentum": 0.99 if layer.momentum is None else layer.momentum}
        config |= {"name": layer.name, "dtype": layer.dtype_policy}
        new = keras.layers.BatchNormalization(**config)
        values = [layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance]
        piece = Piece(new, layer, [v for v in values if v is not None])
        return [piece, *self._behind(layer)]

    def _merged(self, layer: Any, affine: Affine) -> list[Piece]:
        """Keras's BatchNormalization as the map, and what was done behind the normalisation.

        As gamma (x - mean) + beta, which loses no digits where the mean is large. No layer of
        Keras's that scales and shifts is cheaper (``benchmarks/fold.py --stays``).
        """
        new = keras.layers.BatchNormalization(
            axis=affine.axis, epsilon=0.0, name=layer.name, dtype=layer.dtype_policy
        )
        beta = as_float64(layer.beta) if layer.center else 0 * affine.shift
        some = affine.scale != 0
        mean = np.where(some, (beta - affine.shift) / np.where(some, affine.scale, 1.0), 0.0)
        values = [affine.scale, np.where(some, beta, affine.shift), mean, np.ones_like(mean)]
        return [Piece(new, layer, values), *self._behind(layer)]

    def _behind(self, layer: Any) -> list[Piece]:
        """Of a layer that goes: the sum and the activation behind its normalisation, as layers."""
        return behind(layer, self.names, adds=layer in self.adding)


def _between(site: Call, takings: list[Taking], side: str) -> set[Call]:
    """The calls from where a map was to where it is now taken in, but the last."""
    takers = {taker for taker, _ in takings}
    way = {*nearby(site, back=side == "before", stop=takers.__contains__)}
    return way if side == "before" else {site} | (way - takers)


def _no_longer_learns(layer: Any, takings: list[Taking]) -> str:
    """What the receipt says where gamma or beta learned, and what took them in does not."""
    takers = [inside(taker).layer for taker, _ in takings]
    takers = [k for k in takers if not is_batch_normalization(k)]
    kernels = [v for k in takers for v in k.weights if v.name != "bias"]
    lost = {
        "gamma": learns(layer.gamma) and not all(map(learns, kernels)),
        "beta": learns(layer.beta)
        and not all(k.trainable if k.bias is None else learns(k.bias) for k in takers),
    }
    names = " and ".join(name for name, is_lost in lost.items() if is_lost)
    return f", which is frozen: {names} can no longer learn" if names else ""
