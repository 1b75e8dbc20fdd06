"""A line on the standard error stream that says how far a collection is."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from truenorm._records.tables import number
from truenorm._statistics.tally import Pass


@contextmanager
def bar(wanted: bool) -> Generator[Callable[[Pass], None]]:
    """Gives what is told how far a pass is; nothing is shown if that is not wanted."""
    if not wanted:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    passes = 0
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("collecting", total=None)

        def show(seen: Pass) -> None:
            nonlocal passes
            passes += seen.batches == 1
            error = max(s.standard_error(seen.sites[path]) for path, s in seen.spread.items())
            shown.update(
                task,
                description=f"pass {passes}: {seen.samples} samples in {seen.batches} batches, "
                f"standard error {number(error, 2)} std",
            )

        yield show
