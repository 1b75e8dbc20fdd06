"""The ``truenorm`` command: a thin shell over the library.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once; and the
backend is chosen before Keras is imported, which fixes it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from truenorm._backends import Backend
from truenorm._errors import MissingDependencyError, TruenormError

try:
    import typer
except ImportError:
    sys.exit(
        'The truenorm command needs Typer, which is not installed: pip install "truenorm[cli]"'
    )

app = typer.Typer(
    name="truenorm",
    help="The batch-normalization toolkit for Keras 3: where it goes, which mode it is in, "
    "whether its statistics are true.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Data(StrEnum):
    """The demo's data sets; both come inside scikit-learn."""

    digits = "digits"
    breast_cancer = "breast_cancer"


@app.callback()
def _root() -> None:  # pyright: ignore[reportUnusedFunction]
    """Keep `demo` a subcommand while it is the only one."""


@app.command()
def demo(
    data: Annotated[Data, typer.Option(help="What to learn.")] = Data.digits,
    backend: Annotated[
        Backend | None, typer.Option(help="Keras backend; else KERAS_BACKEND, else jax.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of each position.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("truenorm-demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace earlier results.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
) -> None:
    """Show on real data where BatchNormalization goes, what it does, and how to deploy it."""
    choose_backend(backend)
    from truenorm.demo import run

    run(data=data.value, seeds=seeds, out=out, force=force, resume=resume)


def choose_backend(backend: Backend | None) -> None:
    """Set Keras's backend for this process, before Keras is imported."""
    name = backend.value if backend else os.environ.get("KERAS_BACKEND") or Backend.jax.value
    if name not in list(Backend):
        raise MissingDependencyError(
            "truenorm does not work on this Keras backend",
            where="KERAS_BACKEND",
            expected=", ".join(Backend),
            received=name,
        )
    if importlib.util.find_spec(name) is None:
        raise MissingDependencyError(
            f"The backend {name} is not installed", remedy=f'pip install "truenorm[{name}]"'
        )
    os.environ["KERAS_BACKEND"] = name
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings


def main() -> None:
    """Run the command; an error that is truenorm's own becomes one line, Ctrl-C exit code 130."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except TruenormError as error:
        print(f"truenorm: {error}", file=sys.stderr)
        sys.exit(2)
