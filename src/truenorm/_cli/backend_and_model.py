"""What the commands share: their options, the backend, the model file."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from truenorm._backends import Backend
from truenorm._cli import apart
from truenorm._errors import MissingDependencyError

File = Annotated[Path, typer.Argument(help="A .keras file, or an old .h5 one.", show_default=False)]
OnBackend = Annotated[
    Backend | None,
    typer.Option(
        help="Keras backend; else KERAS_BACKEND, Keras's configuration file, or what is installed."
    ),
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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Samples per batch; best the size used in training.")
]


def choose_backend(backend: Backend | None) -> None:
    """Set Keras's backend for this process, before Keras is imported."""
    name = _backend_name(backend)
    keras = sys.modules.get("keras")
    if keras is not None and keras.backend.backend() != name:
        raise MissingDependencyError(
            "Keras is imported already, and its backend is fixed",
            expected=name,
            received=keras.backend.backend(),
        )
    os.environ["KERAS_BACKEND"] = name
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up messages


def _backend_name(option: Backend | None) -> str:
    """The option, else KERAS_BACKEND, else Keras's configuration file, else what is installed.

    A file that names a backend which is not installed decides nothing: Keras writes TensorFlow
    into it without being asked.
    """
    asked = option or os.environ.get("KERAS_BACKEND")
    if asked and asked not in list(Backend):
        raise MissingDependencyError(
            "truenorm does not work on this Keras backend",
            where="KERAS_BACKEND",
            expected=", ".join(Backend),
            received=asked,
            remedy="give --backend, or set KERAS_BACKEND to one of these",
        )
    candidates = [Backend(asked)] if asked else [*_configured_backend(), *Backend]
    for name in candidates:
        if importlib.util.find_spec(name) is not None:
            return name.value
    if asked:
        raise MissingDependencyError(
            f"The backend {asked} is not installed", remedy=f'pip install "truenorm[{asked}]"'
        )
    raise MissingDependencyError(
        "No backend of Keras is installed",
        expected=", ".join(Backend),
        remedy='pip install "truenorm[jax]", or [tensorflow], or [torch]',
    )


def _configured_backend() -> list[Backend]:
    """The backend that Keras's configuration file names, if there is one that truenorm works on."""
    try:
        folder = os.environ.get("KERAS_HOME") or Path.home() / ".keras"
        content = json.loads(Path(folder, "keras.json").read_text("utf-8"))
        return [Backend(content["backend"])]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return []  # no file, not JSON, another backend


def model_of(
    file: Path, backend: Backend | None, max_parameters: int, imports: list[str] | None
) -> Any:
    """The model in a file, loaded with checks and limits on the chosen backend."""
    from truenorm.archive._loading import load, load_here

    choose_backend(backend)
    from truenorm._keras_internals import leave_tensorflow_unloaded

    leave_tensorflow_unloaded()
    if imports:
        sys.path.append(str(Path.cwd()))  # a module of the user's is most often there
    opening = load_here if apart.is_apart() else load
    model = opening(file, max_parameters=max_parameters, imports=imports or ())
    apart.loaded()
    return model
