"""The command ``truenorm demo``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from truenorm._cli.backend_and_model import OnBackend, choose_backend


class Data(StrEnum):
    """The demo's data sets; both come inside scikit-learn."""

    digits = "digits"
    breast_cancer = "breast_cancer"


def demo(
    data: Annotated[Data, typer.Option(help="The data set.")] = Data.digits,
    backend: OnBackend = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often each position is trained.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("truenorm-demo"),
    force: Annotated[
        bool, typer.Option("--force", help="Replace the results of an earlier demo.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was stopped.")
    ] = False,
) -> None:
    """Show on real data where BatchNormalization goes, what it does, and how to deploy it."""
    choose_backend(backend)
    from truenorm._demo.demo import run
    from truenorm._keras_internals import leave_tensorflow_unloaded

    leave_tensorflow_unloaded()
    run(data=data.value, seeds=seeds, out=out, force=force, resume=resume)
