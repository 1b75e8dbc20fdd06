"""What every BatchNormalization call really did: observed, not inferred from flags.

Three facts are recorded, each in its own way: which statistics normalised (see
``which_statistics.py``), whether the moving statistics changed and whether gamma or beta changed
(their values before and after).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from truenorm._checks import known_options
from truenorm._errors import ModelError
from truenorm._keras_internals import in_symbolic_scope, layers_in, require_watchable
from truenorm._kernels.run_time import place, settle
from truenorm._layer.protocol import BatchNormalizationLike
from truenorm._model.hooks import enclosed, intercepted
from truenorm._model.sites import Spot, policy_of, spots
from truenorm._model.snapshot import lasting
from truenorm._model.trainer import (
    changed_after_compile,
    fit_after_change,
    uncompiled,
    variables_of,
)
from truenorm._model.values import numbers
from truenorm._modes.causes import IF_CHANGED
from truenorm._modes.which_statistics import witnessed
from truenorm._records.observation import Calls, Mode, Observation, Statistics
from truenorm._records.tables import joined


@known_options
@contextmanager
def observe(model: Any) -> Generator[Observation]:
    """Record what every BatchNormalization of a model does while the block is open.

    Whatever runs the model inside the block is seen: ``fit``, ``evaluate``, ``predict``, a bare
    call, a loop of your own. So that every call is seen and none that was compiled before hides
    one, ``fit`` and the like run uncompiled meanwhile (as under ``run_eagerly=True``): slower, with
    the same result. Afterwards the model's own compiled functions are back, also after an exception
    or Ctrl-C. A function that you compiled yourself (``tf.function``, ``jax.jit``,
    ``torch.compile``) shows only calls that trace it.

    Args:
        model: Any built Keras model: functional, Sequential or subclassed, with stock layers or
            truenorm's at any nesting.

    Yields:
        The observation. It is filled when the block closes: per site the values of ``training``
        that arrived, ``trainable`` and the freeze policy, the statistics used, how often, and
        whether the moving statistics and gamma and beta changed.

    Raises:
        ModelError: The model has no BatchNormalization, or one that is not built yet.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((4,)), layer])
        >>> x = np.ones((8, 4), "float32")
        >>> with tn.observe(model) as seen:
        ...     _ = model(x)
        ...     _ = model(x, training=True)
        >>> [calls.describe() for calls in seen.modes["bn"].calls]
        ['1× training=None: moving', '1× training=True: batch']
        >>> seen.modes["bn"].updated
        True
    """
    places = spots(model)
    modes: dict[str, Mode] = {}
    observation = Observation(model.name, modes, _notes(model))
    with watched(model, places) as watch:
        try:
            with uncompiled(model), lasting(variables_of(model)):
                yield observation
        finally:
            modes.update({s.path: m for s, m in zip(places, watch.modes(), strict=True)})


@contextmanager
def watched(model: Any, places: list[Spot]) -> Generator[Watch]:
    """Watch the calls of these spots while open.

    Raises:
        ModelError: Statistics were assigned where JAX loses them.
    """
    require_watchable()
    watch = Watch(places)
    containers = [
        one
        for one in layers_in(model)
        if one not in watch.spots_of and not watch.spots_of.keys().isdisjoint(layers_in(one))
    ]
    try:
        with intercepted(watch.spots_of, watch.see), enclosed(containers, watch.forward_pass):
            yield watch
    except Exception as error:
        watch.refuse_escaped(error)
        raise
    watch.refuse_escaped()


class Watch:
    """Counts the calls of each spot."""

    def __init__(self, places: Iterable[Spot]) -> None:
        self.spots_of: dict[Any, list[Spot]] = defaultdict(list)
        for spot in places:
            self.spots_of[spot.layer].append(spot)
        self.seen: dict[Spot, Counter[tuple[Any, ...]]] = {spot: Counter() for spot in places}
        self.before = {layer: _values(layer) for layer in self.spots_of}
        self.depth = 0
        self.turn: Counter[Any] = Counter()
        self.outside: Any = None
        self.assigned_inside: dict[Any, Any] = {}
        self.escaped: set[Any] = set()

    @contextmanager
    def forward_pass(self) -> Generator[None]:
        """Inside a call of the model: which call of a shared layer it is counts from its start."""
        if not self.depth:
            self.outside = place()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self.turn.clear()
                for layer, value in self.assigned_inside.items():
                    if layer.moving_mean.value is value:
                        self.escaped.add(layer)
                self.assigned_inside.clear()

    def see(
        self, layer: BatchNormalizationLike, original: Any, inputs: Any, **arguments: Any
    ) -> Any:
        """Run a call, and note what it does whenever it is computed."""
        if in_symbolic_scope():  # Keras looks for shapes: nothing is computed
            return original(inputs, **arguments)
        spot = self._next_spot(layer)
        call = (_plain(arguments.get("training")), bool(layer.trainable), policy_of(layer))

        def note(statistics: Statistics) -> None:
            self.seen[spot][(*call, statistics)] += 1

        once = self.depth > 0 and place() == self.outside  # it runs as often as the model does
        inside = self.depth > 0 and not once
        held = layer.moving_mean.value if inside else None
        outputs = witnessed(layer, original, inputs, arguments, note, once=once)
        if inside and layer.moving_mean.value is not held:
            self.assigned_inside[layer] = layer.moving_mean.value
        return outputs

    def _next_spot(self, layer: BatchNormalizationLike) -> Spot:
        its_spots = self.spots_of[layer]
        spot = its_spots[min(self.turn[layer], len(its_spots) - 1)]
        self.turn[layer] += bool(self.depth)
        return spot

    def modes(self) -> tuple[Mode, ...]:
        """What each spot did so far, in the order of the spots."""
        settle()
        effects = {layer: _effect(layer, before) for layer, before in self.before.items()}
        return tuple(
            Mode(
                tuple(Calls(*kind, times=times) for kind, times in seen.items()),
                *effects[spot.layer],
            )
            for spot, seen in self.seen.items()
        )

    def refuse_escaped(self, error: Exception | None = None) -> None:
        """Refuse, with the remedy, statistics that were assigned where JAX loses them."""
        if self.escaped:
            paths = [spot.path for spot in self.seen if spot.layer in self.escaped]
            raise ModelError(
                "JAX loses the statistics of this BatchNormalization: in training mode it runs "
                "inside something that JAX traces by itself (an RNN, a loop, a conditional, "
                "keras.remat, a vectorised map), where Keras cannot assign to variables; "
                "nor can fit train the model",
                where=joined(paths),
                remedy="unroll=True at an RNN, a loop or conditional of Python's, tn.remat in the "
                "place of keras.remat; or freeze it",
            ) from error


def _plain(training: Any) -> Any:
    """The value as it is, or that it is a tensor, whose value may not be known yet."""
    return training if training is None or isinstance(training, bool) else "a tensor"


def _effect(
    layer: BatchNormalizationLike, before: tuple[list[bytes], list[bytes]]
) -> tuple[bool, bool]:
    """Whether the moving statistics changed, and whether gamma or beta did."""
    statistics, affine = _values(layer)
    return statistics != before[0], affine != before[1]


def _values(layer: BatchNormalizationLike) -> tuple[list[bytes], list[bytes]]:
    """The bytes of the statistics, what is gathered for them, and those of gamma and beta."""
    statistics = (layer.moving_mean, layer.moving_variance, getattr(layer, "gathered", None))
    found = ([w for w in some if w is not None] for some in (statistics, (layer.gamma, layer.beta)))
    of_statistics, of_affine = ([numbers(w).tobytes() for w in some] for some in found)
    return of_statistics, of_affine


def _notes(model: Any) -> tuple[str, ...]:
    changed = [*changed_after_compile(model)]
    if not changed:
        return ()
    names = ", ".join(f"'{layer.name}'" for layer in changed[:3])
    return (
        f"trainable of {names}{' and others' if len(changed) > 3 else ''} was changed after the "
        f"model was compiled. Uncompiled, as here, fit {fit_after_change(model, compiled=False)}; "
        f"else fit {fit_after_change(model)}. {IF_CHANGED}.",
    )
