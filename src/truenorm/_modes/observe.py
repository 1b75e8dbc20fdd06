"""What every BatchNormalization call really did: observed, not inferred from flags.

Three facts are recorded, each in its own way: which statistics normalised (which of the layer's own
methods ran), whether the moving statistics changed and whether gamma or beta changed (their values
before and after).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from truenorm._keras_internals import (
    in_symbolic_scope,
    layers_in,
    moments_method,
    require_watchable,
)
from truenorm._model.hooks import enclosed, intercepted, noted
from truenorm._model.sites import Spot, policy_of, spots
from truenorm._model.trainer import changed_after_compile, uncompiled
from truenorm._model.values import numbers
from truenorm._records.observation import Calls, Mode, Observation


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
    with watched(model, places) as result, uncompiled(model):
        try:
            yield observation
        finally:
            modes.update({s.path: m for s, m in zip(places, result(), strict=True)})


@contextmanager
def watched(model: Any, places: list[Spot]) -> Generator[Callable[[], tuple[Mode, ...]]]:
    """Watch these spots while open; gives what makes their modes so far, in the same order."""
    require_watchable()
    watch = _Watch(places)
    containers = [
        one
        for one in layers_in(model)
        if one not in watch.spots_of and not watch.spots_of.keys().isdisjoint(layers_in(one))
    ]
    with intercepted(watch.spots_of, watch.see), enclosed(containers, watch.forward_pass):
        yield watch.modes


class _Watch:
    """Counts the calls of each spot."""

    def __init__(self, places: Iterable[Spot]) -> None:
        self.spots_of: dict[Any, list[Spot]] = defaultdict(list)
        for spot in places:
            self.spots_of[spot.layer].append(spot)
        self.seen: dict[Spot, Counter[tuple[Any, ...]]] = {spot: Counter() for spot in places}
        self.before = {layer: _values(layer) for layer in self.spots_of}
        self.depth = 0
        self.turn: Counter[Any] = Counter()

    @contextmanager
    def forward_pass(self) -> Generator[None]:
        """Inside a call of the model: which call of a shared layer it is counts from its start."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self.turn.clear()

    def see(self, layer: Any, original: Any, inputs: Any, **arguments: Any) -> Any:
        batch: list[str] = []
        with noted(layer, ("_normalize_batch", moments_method()), lambda: batch.append("batch")):
            outputs = original(inputs, **arguments)
        if in_symbolic_scope():  # Keras looks for shapes: nothing is computed
            return outputs
        its_spots = self.spots_of[layer]
        spot = its_spots[min(self.turn[layer], len(its_spots) - 1)]
        self.turn[layer] += bool(self.depth)
        kind = (
            _plain(arguments.get("training")),
            bool(layer.trainable),
            policy_of(layer),
            "batch" if batch else "moving",
        )
        self.seen[spot][kind] += 1
        return outputs

    def modes(self) -> tuple[Mode, ...]:
        effects = {layer: _effect(layer, before) for layer, before in self.before.items()}
        return tuple(
            Mode(
                tuple(Calls(*kind, times=times) for kind, times in seen.items()),
                *effects[spot.layer],
            )
            for spot, seen in self.seen.items()
        )


def _plain(training: Any) -> Any:
    """The value as it is, or that it is a tensor, whose value may not be known yet."""
    return training if training is None or isinstance(training, bool) else "a tensor"


def _effect(layer: Any, before: tuple[list[bytes], list[bytes]]) -> tuple[bool, bool]:
    """Whether the moving statistics changed, and whether gamma or beta did."""
    statistics, affine = _values(layer)
    return statistics != before[0], affine != before[1]


def _values(layer: Any) -> tuple[list[bytes], list[bytes]]:
    """The bytes of the statistics, and of gamma and beta."""
    statistics = (layer.moving_mean, layer.moving_variance)
    affine = (weight for weight in (layer.gamma, layer.beta) if weight is not None)
    return [numbers(w).tobytes() for w in statistics], [numbers(w).tobytes() for w in affine]


def _notes(model: Any) -> tuple[str, ...]:
    changed = changed_after_compile(model)
    if not changed:
        return ()
    names = ", ".join(f"'{layer.name}'" for layer in changed[:3])
    return (
        f"trainable of {names}{' and others' if len(changed) > 3 else ''} was changed after the "
        "model was compiled. "
        "Uncompiled, as here, fit obeys; a step that TensorFlow compiled before goes on as it was, "
        "and JAX raises an error. Compile again, or change it with truenorm's freeze.",
    )
