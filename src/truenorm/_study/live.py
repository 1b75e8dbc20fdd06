"""A study while it runs: a line per running trial, the time left, and means without tests.

No p-value is shown before the end: whoever watches it while trials come in is tempted to stop as
soon as it is small, and then it means nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from truenorm._model.progress import Wanted, duration, is_notebook, is_shown, is_terminal, shown
from truenorm._study.pool import OnEvent, Progress


class View:
    """What is known of a study so far, as lines of text."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, int], Progress] = {}
        self._finals: dict[str, list[float]] = {}
        self._metric = ""
        self._begun = time.monotonic()
        self._first_done: int | None = None
        self._done = self._total = self._failed = 0

    def update(self, event: Progress) -> None:
        """Take in one event."""
        if self._first_done is None:  # what an earlier run had finished says nothing of the speed
            self._first_done = event.done
        self._done, self._total = event.done, event.total
        key = (event.position, event.seed)
        if event.kind in ("started", "epoch"):
            self._running[key] = event
            return
        self._running.pop(key, None)
        self._failed += event.kind == "failed"
        if event.kind == "finished":
            names = [name for name in event.metrics if not name.endswith("loss")]
            self._metric = self._metric or next(iter(names), "val_loss")
            if self._metric in event.metrics:
                self._finals.setdefault(event.position, []).append(event.metrics[self._metric])

    def left(self) -> float | None:
        """Seconds until the end, at the speed so far; None before the first trial has ended."""
        ended = self._done - (self._first_done or 0)
        if ended <= 0:
            return None
        return (time.monotonic() - self._begun) / ended * (self._total - self._done)

    def lines(self) -> list[str]:
        """One line for the whole, one for each running trial, one for each variant's mean."""
        left = self.left()
        when = "" if left is None else f", about {duration(left)} left"
        failed = f", {self._failed} failed" if self._failed else ""
        lines = [f"{self._done} of {self._total} trials{failed}{when}"]
        for (name, seed), event in sorted(self._running.items()):
            known = ", ".join(f"{key} {value:.4g}" for key, value in event.metrics.items())
            lines.append(
                f"  {name}, seed {seed}: epoch {event.epoch} of {event.epochs}"
                + (f"  ({known})" if known else "")
            )
        means = [
            f"{name} {statistics.fmean(values):.4g} ({len(values)})"
            for name, values in self._finals.items()
        ]
        if means:
            lines.append(f"mean {self._metric} so far (trials): {', '.join(means)}")
        return lines

    def __rich__(self) -> Group:
        first, *rest = self.lines()
        bar = Table.grid(padding=(0, 1))
        share = self._done / self._total if self._total else 0.0
        width = 30
        bar.add_row(Text("━" * round(width * share) + "─" * (width - round(width * share))), first)
        return Group(bar, *(Text(line, overflow="ellipsis", no_wrap=True) for line in rest))


@contextmanager
def told(wanted: Wanted) -> Generator[OnEvent | None]:
    """Show a study that is called in Python, where that is wanted."""
    if not is_shown(wanted):
        yield None
    elif is_notebook() and not is_terminal():
        view = View()
        with shown(True, "study") as line:

            def tell(event: Progress) -> None:
                view.update(event)
                line.tell(view.lines()[0])

            yield tell
    else:
        with live(Console(highlight=False, stderr=True)) as on_event:
            yield on_event


@contextmanager
def live(console: Console) -> Generator[OnEvent]:
    """Show a study on a terminal; elsewhere one line per trial that has ended."""
    view = View()
    if not console.is_terminal:

        def tell(event: Progress) -> None:
            view.update(event)
            if event.kind in ("finished", "failed"):
                why = f" ({(event.error or '').splitlines()[0]})" if event.error else ""
                line = f"{event.kind} {event.position}, seed {event.seed}{why}: {view.lines()[0]}"
                console.print(line, markup=False, soft_wrap=True)

        yield tell
        return
    with Live(view, console=console, refresh_per_second=4, transient=True):
        yield view.update
