"""What BatchNormalization does while a model trains, and warnings while they still help."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from truenorm._checks import check_integer
from truenorm._diagnosis.diagnose import judged, refuse_endless, selection
from truenorm._diagnosis.facts import Facts
from truenorm._errors import DataError
from truenorm._model.domains import require_one_domain
from truenorm._model.sites import batch_normalizations, describe_spot, spots
from truenorm._modes.causes import surprises
from truenorm._records.diagnosis import Finding
from truenorm._records.inspection import Inspection
from truenorm._records.moments import Array
from truenorm._records.monitoring import QUANTITIES, Monitoring, Noticed
from truenorm._records.observation import Mode
from truenorm._records.tables import joined
from truenorm._statistics.runner import Runner
from truenorm.callbacks._monitor_measures import Changes, Seen, measured, steps_of

_RULES = ("TN1", "TN2", "TN4")
"""Those that can be told while a model trains: the others are about what it is built of."""


class Monitor(keras.callbacks.Callback):
    r"""Watch every BatchNormalization while ``fit`` trains, and warn while it still helps.

    It looks at two steps in a row and reads the moving statistics before, between and after them.
    A step of a moving average gives away the batch that it was taken with,

    .. math:: \mu_B = m_0 + \frac{m_1 - m_0}{1 - \alpha} ,

    so the numbers are those of the training's own batches and modes, on every backend, and cost
    three reads of the statistics and no pass of the model. Nothing of the training changes. (Of the
    devices of ``tf.distribute.MirroredStrategy`` it reads the first.) By default it looks at the
    last two steps of each epoch. At the end of an epoch the rules of :func:`truenorm.diagnose`
    about statistics, parameters and modes are checked (``TN1``, ``TN2``, ``TN4``); each finding
    above a note is a Python warning, once.

    ``logs`` get one number of each kind over all layers, so that ``History``, ``CSVLogger``,
    ``TensorBoard`` and others, *listed after this callback*, have them: ``bn_distance``,
    ``bn_noise``, ``bn_gamma``, ``bn_beta``, ``bn_dead``, with ``renorm`` ``bn_clipped``, and
    ``bn_findings``, how many findings above a note there are. See :class:`truenorm.Monitoring`;
    ``history`` has all of it per layer and look. A callback that replaces statistics
    (``Recalibrate``) goes after this one, too.

    Args:
        every: Look at two steps in every so many; None: at the last two of each epoch (the first
            two of the first, where nobody knows how long it is).
        validation: Data on which the rules that need some are checked as well, at the end of each
            epoch: what ``fit`` takes as ``(x, y)`` or batches of it. It is read two or three times
            per epoch.
        batch_size: Of ``validation``, if that is arrays.

    Attributes:
        history: A :class:`truenorm.Monitoring`; None before the first ``fit``.

    Raises:
        OptionError: ``every`` is not a positive integer.
        ModelError: When ``fit`` begins: the model has no BatchNormalization, or one with domains.
        DataError: When ``fit`` begins: ``validation`` has no end, or can be read only once.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((1,)), layer, keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x = np.random.default_rng(0).normal(3.0, 2.0, (64, 1)).astype("float32")
        >>> monitor = tn.callbacks.Monitor()
        >>> history = model.fit(x, x, batch_size=16, epochs=2, callbacks=[monitor], verbose=0)
        >>> sorted(key for key in history.history if key.startswith("bn_"))
        ['bn_beta', 'bn_dead', 'bn_distance', 'bn_findings', 'bn_gamma', 'bn_noise']
        >>> monitor.history.values["distance"].shape, monitor.history.modes[-1]
        ((2, 1), ('batch + updates + learns',))
    """

    def __init__(
        self, every: int | None = None, validation: Any = None, *, batch_size: int = 32
    ) -> None:
        super().__init__()
        self.every = None if every is None else check_integer("every", every)
        self.validation, self.batch_size = validation, batch_size
        self.history: Monitoring | None = None
        self._looks: list[tuple[int, int, dict[str, list[float]], tuple[str, ...]]] = []
        self._moments: list[Seen] = []

    # --- when to look --------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Refuse at once what could not be done later."""
        model = self.model
        self._layers = batch_normalizations(model)
        require_one_domain(self._layers)
        self._spots = spots(model)
        self._calls = Counter(spot.layer for spot in self._spots)
        self._refuse_unreadable()
        self._runner = None
        if self.validation is not None:
            self._runner = Runner(model, self._layers, outputs=True)
        self._changes = Changes([*self._layers])
        self._looks, self._moments = [], []
        self._variances: dict[str, Array] = {}
        self._noticed: dict[tuple[str, str], Noticed] = {}
        self._trained, self._in_epoch, self._next = 0, 0, 0
        self._length: int | None = (self.params or {}).get("steps")
        self._tried_out = False
        self._inspection: Inspection | None = None
        self.history = self._record()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Nothing seen yet."""
        model: Any = self.model
        self._several = int(model.steps_per_execution or 1)
        self._epoch, self._in_epoch, self._looked = epoch, 0, False
        self._done: list[dict[Any, Mode]] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Look, when it is time: what a step has done is read before the next."""
        # Of data of unknown length the last step begins and finds none.
        self._in_epoch = min(batch + self._several, self._length) if self._length else batch
        if self._moments:
            self._see(batch)
        if not self._moments and self._is_due(batch):
            self._see(batch)

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """The last step of an epoch has no next one."""
        if self._moments:
            self._see(self._in_epoch, last=True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Numbers for ``logs``, and what the rules say."""
        self.on_test_begin()
        self._trained += self._in_epoch
        self._length = self._length or self._in_epoch
        found = self._check()
        for one in found:
            before = self._noticed.get((one.code, one.site))
            epochs = (*(before.epochs if before else ()), epoch)
            self._noticed[one.code, one.site] = Noticed(epochs, one)
        self.history = self._record()
        if logs is not None:
            summary = self.history.overall(epoch)
            if not any(layer.renorm for layer in self._layers):
                del summary["clipped"]
            logs.update({f"bn_{name}": value for name, value in summary.items()})
            logs["bn_findings"] = sum(finding.severity != "note" for finding in found)
        self._warn(found, epoch)

    def _is_due(self, batch: int) -> bool:
        if self.every is not None:
            due = self._trained + batch >= self._next
            self._next += self.every * due
            return due
        due = not self._looked and batch >= (self._length or 0) - 2 * self._several
        self._looked |= due
        return due

    def _see(self, batch: int, *, last: bool = False) -> None:
        """One of the moments of a look."""
        _ = self.model  # on JAX that attaches its state of now; so no other step asks for it
        self._moments.append(Seen.now(self._trained + batch, [*self._layers]))
        if last or len(self._moments) == 3:
            self._look()

    def _look(self) -> None:
        moments, self._moments = self._moments, []
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # NaN and the like
            steps = {k: steps_of(k, moments, self._calls[k]) for k in self._layers}
            rows = [measured(layer, own) for layer, own in steps.items()]
        self._variances |= {
            self._layers[layer]: own[-1].batch.variance for layer, own in steps.items() if own
        }
        done = self._changes.modes()
        self._done.append(done)
        values = {name: [row[name] for row in rows] for name in QUANTITIES}
        modes = tuple(done[layer].describe() for layer in self._layers)
        self._looks.append((self._epoch, moments[-1].step, values, modes))

    def _record(self) -> Monitoring:
        model: Any = self.model
        epochs, steps, values, modes = zip(*self._looks, strict=True) if self._looks else [()] * 4
        width = len(self._layers)
        return Monitoring(
            model.name,
            (*self._layers.values(),),
            tuple(int(layer.moving_mean.shape[0]) for layer in self._layers),
            tuple(epochs),
            tuple(steps),
            {n: np.array([look[n] for look in values]).reshape(-1, width) for n in QUANTITIES},
            tuple(modes),
            tuple(self._noticed.values()),
        )

    # --- what it means -------------------------------------------------------------------------

    def _check(self) -> tuple[Finding, ...]:
        """What the rules find now; on data where there is some."""
        facts = Facts(
            self.model,
            self.validation,
            None,
            self.batch_size,
            observed=self._observed(),
            variances=self._variances,
            runner=self._runner,
        )
        return judged(facts, selection(_RULES)).findings

    def _observed(self) -> Inspection | None:
        """What the layers did in this epoch, as far as it explains itself.

        A layer that moved nothing though nothing holds it is tried out, once: None.
        """
        did = {layer: _together([k[layer] for k in self._done]) for layer in self._layers}
        if not self._tried_out and any(mode.statistics == "unknown" for mode in did.values()):
            self._tried_out = True
            return None
        modes = {"fit": tuple(did[spot.layer] for spot in self._spots)}
        if self._inspection is None or self._inspection.modes != modes:  # as a rule it is as ever
            model: Any = self.model
            sites = tuple(map(describe_spot, self._spots))
            causes = surprises(model, self._spots, modes)
            self._inspection = Inspection(model.name, sites, modes, causes)
        return self._inspection

    def _warn(self, found: Iterable[Finding], epoch: int) -> None:
        new: dict[str, list[Finding]] = {}
        for one in found:
            if one.severity != "note" and self._noticed[one.code, one.site].epochs == (epoch,):
                new.setdefault(one.code, []).append(one)
        for code, same in new.items():
            where = joined([f"'{one.site}'" for one in same])
            message = (
                f"{code} after epoch {epoch + 1}: {same[0].problem} (at {where}). "
                f"Remedy: {same[0].remedy}."
            )
            warnings.warn(message, UserWarning, stacklevel=2)

    def _refuse_unreadable(self) -> None:
        refuse_endless(self.validation)
        if isinstance(self.validation, Iterator):
            raise DataError(
                "The data of the monitor is read in every epoch",
                where="validation",
                expected="arrays, or an iterable that begins anew each time",
                received=f"an iterator ({type(self.validation).__name__})",
                remedy="give what the iterator was made of, or a list of its batches",
            )


def _together(modes: list[Mode]) -> Mode:
    """What a layer did in several looks."""
    if not modes:
        return Mode((), updated=False, learned=False)
    best = next((mode for mode in modes if mode.updated), modes[-1])
    return replace(best, learned=any(mode.learned for mode in modes))
