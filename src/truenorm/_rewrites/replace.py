"""Swap every BatchNormalization of a model for another layer, or for one with other options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from truenorm._errors import ModelError, OptionError
from truenorm._keras_internals import layers_in
from truenorm._model.edit import Edit, Piece
from truenorm._model.graph import Graph, graph_of, read_graph
from truenorm._model.progress import Wanted, shown
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import spots, with_kinds
from truenorm._model.trainer import has_optimizer
from truenorm._records.rewrite import Change, Left, Rewrite
from truenorm._rewrites.fuse import Fusion, compared_fusions, fused, fusions
from truenorm._rewrites.targets import Target, To, target_of
from truenorm._rewrites.unfuse import adding_layers, behind, compared_unfused, names_in
from truenorm._rewrites.verify import Proof, verify


def replace(
    model: Any,
    to: To = "truenorm",
    *,
    groups: int | None = None,
    fuse: bool = False,
    probe: Any = None,
    progress: Wanted = None,
    **options: Any,
) -> Rewrite:
    r"""Swap every BatchNormalization for another layer, or for one with other options.

    ``"truenorm"``, ``"keras"`` and ``"affine"`` keep what the model computes in inference: outputs
    are compared on a probe before the new model is returned. ``"group"`` and ``"layer"`` do not
    and cannot: each sample is then normalised by itself, as small batches, private training and
    per-sample gradients ask for, and the new model has to be trained. The receipt says which.

    ========== ===================== ===============================================================
    to         layer                 normalises with
    ========== ===================== ===============================================================
    truenorm   truenorm's            the batch or the moving statistics
    keras      Keras's               the same
    group      GroupNormalization    one sample's: groups of channels, all positions
    layer      LayerNormalization    one sample's: all channels, each position by itself
    affine     a map that is frozen  nothing: a scale and a shift made of the moving statistics
    ========== ===================== ===============================================================

    The model given is not changed. Layers are found wherever a model holds them: inside wrappers,
    RNN cells, blocks and nested models of your own classes, in attributes, lists and dicts; the
    objects around them are copied with all that they hold. A sum and an activation inside a layer
    stand behind the new one as layers (``bn_add``, ``bn_activation``); so ``"keras"`` undoes
    ``fuse``. A layer that the new one cannot stand for is left, with its reason in the receipt: one
    with an option that Keras's does not have, or with an activation inside where no graph shows
    where that can go.

    Args:
        model: Any built ``keras.Model``, subclassed ones and nested ones included.
        to: What every site shall have; see the table.
        groups: With ``"group"``: how many groups; it has to divide the channels of every
            layer. Not given: 32, as in the paper, or the largest smaller number that does. 1 is
            layer normalization over channels and positions together.
        fuse: With ``"truenorm"``: whether each layer takes in the ReLU that follows it, and the
            addition of a residual block between the two:

            .. math:: y = \max(0, BN(x)), \qquad y = \max(0, BN(x) + r) .

            On PyTorch they cost no pass of their own then, and less is kept in between. It is done
            where nothing else takes the outputs between the layers; the receipt says what was taken
            in, and where nothing could be, why. The layers taken in are gone from the model;
            ``to="keras"`` puts them back, and :func:`truenorm.fold` where it folds a layer.
            Outputs are compared in training as well, both ways.
        probe: Inputs to compare on, or data in batches, of which the first is taken; made from the
            input specification where none are given. What a subclassed model takes is not known:
            without a probe each layer is compared by itself.
        progress: Whether to show what is going on, on the standard error stream. None: on a
            terminal and in a notebook.
        **options: With ``"truenorm"`` and ``"keras"``: arguments of the layer's constructor that
            decide how it trains, for every site: ``synchronized``, ``virtual_batch_size``,
            ``momentum``, ``renorm``, ``bessel_correction``, ``freeze``… Statistics that an option
            brings along begin at the moving ones; with ``momentum=None`` the count of batches
            begins at 0, and the first batch takes their place.

    Returns:
        The new model with its receipt. Layer names, weights (of ``"group"`` and ``"layer"`` gamma
        and beta), ``trainable`` flags (of single variables, too), dtype policies and the compile
        configuration are carried over; the optimizer starts anew. Weights are the same bit for bit,
        but under a 16-bit policy, where Keras's layer keeps its statistics in 16 bits. What a
        constructor of your own makes, it makes again as it is written when a file is loaded: notes
        say where that is.

    Raises:
        ModelError: The model is not built, has no BatchNormalization, or holds what cannot be
            copied.
        OptionError: ``to`` is something else; ``groups`` does not divide the channels, or ``fuse``
            does not go with ``to``; an option is none of the layer's, or would change what it
            computes.
        DataError: The model does not take ``probe``.
        VerificationError: The outputs would differ by more than rounding.

    Example:
        >>> import keras, truenorm as tn
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> rewrite = tn.replace(model, synchronized=True)
        >>> type(rewrite.model.layers[0]).__module__.split(".")[0], len(rewrite.changed)
        ('truenorm', 1)
        >>> type(tn.replace(model, to="group", groups=2).model.layers[0]).__name__
        'GroupNormalization'

    Reference:
        Wu and He (2018), "Group Normalization", arXiv:1803.08494. Ba, Kiros and Hinton (2016),
        "Layer Normalization", arXiv:1607.06450.
    """
    taking, without = _to_fuse(model, to, fuse)
    target = target_of(model, to, groups, options, taking)
    plain, changed, left = _plan(model, target, taking, without)
    edit = fused(plain, taking)
    notes = tuple(_notes(model, edit))
    with shown(progress, "replacing") as line:
        line.step("making the new model")
        new, kind = rebuild(model, edit), f"replace to {target.name}{', fuse=True' if fuse else ''}"
        if target.note is not None:
            said = (target.note,) if changed else ()
            return Rewrite(new, kind, changed, left, notes=(*said, *notes))
        graph = Graph(model, ()) if graph_of(model) is None else read_graph(model)
        more = partial(compared_fusions, plain, taking)
        if to == "keras":  # in training too
            more = partial(compared_unfused, plain, adding_layers(model))
        proof = verify(graph, plain, (), new, probe, "Replacing", line, more)
    proof = Proof(*proof[:3], notes=(*proof.notes, *notes))
    return Rewrite(new, kind, changed, left, *proof)


def why_not_replaced(model: Any, to: To) -> dict[str, str]:
    """Path of every site that stays, and why: all of them, if the model cannot be copied."""
    edit, changed, left = _plan(model, target_of(model, to, None, {}))
    try:
        rebuild(model, edit)
    except ModelError as error:
        left = (*left, *(Left(change.path, str(error)) for change in changed))
    return {site.path: site.reason for site in left}


def _to_fuse(model: Any, to: Any, fuse: Any) -> tuple[dict[Any, Fusion], dict[Any, str]]:
    """What layers take in, and what is said of those that take in nothing."""
    if fuse not in (True, False) or (fuse and to != "truenorm"):
        raise OptionError(
            "Only truenorm's layer takes a ReLU in",
            where="fuse",
            expected="True or False; if True, to='truenorm'",
            received=f"fuse={fuse!r}, to={to!r}",
        )
    found, reasons = fusions(model) if fuse else ({}, {})
    return found, {layer: f"; it takes nothing in: {why}" for layer, why in reasons.items()}


def _plan(
    model: Any,
    target: Target,
    taking: Mapping[Any, Fusion] = MappingProxyType({}),
    without: Mapping[Any, str] = MappingProxyType({}),
) -> tuple[Edit, tuple[Change, ...], tuple[Left, ...]]:
    """One layer in the place of another, and the receipt."""
    edit: dict[Any, list[Piece]] = {}
    reasons: dict[Any, str | None] = {}
    places = spots(model)
    for spot in places:  # a shared layer stays if one of its calls does not let it go
        reasons[spot.layer] = reasons.get(spot.layer) or target.why_left(spot)
    names, adding = names_in(model), adding_layers(model)
    said = {layer: fusion.what for layer, fusion in taking.items()} | {**without}
    for layer in [layer for layer, reason in reasons.items() if reason is None]:
        try:
            edit[layer] = [target.piece(layer)]
        except OptionError as error:  # options of its own and the new ones do not go together
            reasons[layer] = str(error)
            continue
        if target.bare:
            edit[layer] += behind(layer, names, adds=layer in adding)
            kinds = [type(piece.layer).__name__ for piece in edit[layer][1:]]
            said[layer] = f", with {' and '.join(kinds)} behind it" if kinds else ""
    changed = tuple(
        Change(s.path, target.what + said.get(s.layer, "")) for s in places if s.layer in edit
    )
    left = tuple(
        Left(s.path, why + without.get(s.layer, ""))
        for s in places
        if (why := reasons[s.layer]) is not None
    )
    if (taking or without) and graph_of(model) is not None:
        labels = read_graph(model).labels
        changed, left = with_kinds(labels, changed), with_kinds(labels, left)
    return edit, changed, left


def _notes(model: Any, edit: Edit) -> Iterator[str]:
    if edit and has_optimizer(model):
        yield (
            "The optimizer starts anew: what it has gathered of the old model (momentum, averages) "
            "is not carried over."
        )
    makers = [one for one in layers_in(model) if _makes_its_own(one, edit)]
    if makers:
        names = ", ".join(dict.fromkeys(type(one).__name__ for one in makers))
        yield (
            f"Layers inside {names} are made by a constructor: a file that is loaded has them as "
            "that one makes them. Change it there too, if the model is to be saved."
        )


def _makes_its_own(holder: Any, edit: Edit) -> bool:
    """Whether an edited layer is inside a layer of somebody's class, by no graph."""
    inside = layers_in(holder, itself=False)
    kerass = type(holder).__module__.partition(".")[0] == "keras"
    return not kerass and graph_of(holder) is None and any(layer in edit for layer in inside)
