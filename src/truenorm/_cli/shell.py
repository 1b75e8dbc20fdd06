"""What the commands share: their options, the backend, the model file, the output."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from truenorm._backends import Backend
from truenorm._cli import isolation
from truenorm._errors import MissingDependencyError
from truenorm._records.tables import Record, printable
from truenorm.archive import load, save
from truenorm.archive._loading import check_name, load_here

File = Annotated[Path, typer.Argument(help="A .keras file, or an old .h5 one.", show_default=False)]
Out = Annotated[
    Path, typer.Option(help="The .keras file to write; may be the one read.", show_default=False)
]
OnBackend = Annotated[
    Backend | None, typer.Option(help="Keras backend; else KERAS_BACKEND, else jax.")
]
MaxParameters = Annotated[
    int, typer.Option(min=1, help="Refuse a model with more parameters than this.")
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a module with custom classes first (its code runs); may be repeated.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Samples per batch; that of training is right.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    keras = sys.modules.get("keras")
    if keras is not None and keras.backend.backend() != name:
        raise MissingDependencyError(
            "Keras is imported already, and its backend is fixed",
            expected=name,
            received=keras.backend.backend(),
        )
    os.environ["KERAS_BACKEND"] = name
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings


def model_of(
    file: Path, backend: Backend | None, max_parameters: int, imports: list[str] | None
) -> Any:
    """The model in a file, loaded with care on the backend asked for."""
    choose_backend(backend)
    if imports:
        sys.path.append(str(Path.cwd()))  # a module of the user's is most often there
    opening = load_here if isolation.is_apart() else load
    model = opening(file, max_parameters=max_parameters, imports=imports or ())
    isolation.loaded()
    return model


def show(record: Record, *, as_json: bool) -> None:
    """Print a record. The pipe may be closed by its reader: the flush makes it show here."""
    if as_json:
        print(record.to_json())
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() else 120
        Console(highlight=False, width=width).print(record)
    sys.stdout.flush()


def write(model: Any, out: Path, *, as_json: bool) -> None:
    """Save a model, and say so if the output is for people."""
    check_name(out)
    elsewhere = isolation.handed_over()
    save(model, elsewhere or out)
    if not as_json and elsewhere is None:
        print(f"Saved as {printable(str(out))}")
        sys.stdout.flush()
