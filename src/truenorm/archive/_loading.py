"""Load a model from a ``.keras`` file within limits and from allowed classes; save one whole.

``keras.saving.load_model`` does the loading. Around it the file is checked first, classes are
compared with a list of those allowed, and variables are counted while Keras makes them, each
before its memory is allocated.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from truenorm._checks import check_integer
from truenorm._errors import ArchiveError, OptionError, OutputError
from truenorm._records.files import replacing
from truenorm._records.tables import printable
from truenorm.archive._classes import Classes
from truenorm.archive._container import CONFIG, opened, read_json, verify_checksums, weights

MOST_PARAMETERS = 500_000_000
OURS = "truenorm>BatchNormalization"
"""What our layer is registered as."""

_KERAS_RAISES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a forged configuration can make Keras raise."""


def load(
    path: str | os.PathLike[str],
    *,
    max_parameters: int = MOST_PARAMETERS,
    imports: Collection[str] = (),
) -> Any:
    """Load a model from a ``.keras`` file, with checks and limits.

    Before anything is made, the file is checked as :func:`truenorm.archive.read` does it, with the
    checksum of every member, and every class that it names must be one of Keras's that models are
    made of, truenorm's, or one that a module in ``imports`` registers. Keras then loads it in safe
    mode and without compiling; a variable that would exceed ``max_parameters`` is refused before
    its memory is allocated.

    Args:
        path: The ``.keras`` file.
        max_parameters: The most parameters that the model may have, all variables together.
        imports: Modules of yours to import first, which register custom classes
            (``keras.saving.register_keras_serializable``). Their code runs.

    Returns:
        The model, not compiled.

    Raises:
        ArchiveError: The file is damaged or made to do harm; it holds code (``Lambda``) or names a
            class that is not allowed; it asks for too many parameters; Keras cannot load it, or
            TensorFlow not run it; or the process is in Keras's unsafe mode.
        OptionError: A module in ``imports`` cannot be imported, or ``max_parameters`` is not a
            positive integer.

    Example:
        >>> import tempfile, keras
        >>> from truenorm import archive
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(model, f"{folder}/model.keras")
        ...     loaded = archive.load(f"{folder}/model.keras", max_parameters=1000)
        >>> [type(layer).__name__ for layer in loaded.layers]
        ['BatchNormalization']
    """
    check_integer("max_parameters", max_parameters)
    with opened(path) as archive:
        config = read_json(archive, CONFIG)
        verify_checksums(archive)
        with weights(archive):
            pass  # its links are checked

    import keras  # here, so that reading a file does not wait for it

    from truenorm._layer.batch_normalization import BatchNormalization

    _refuse_unsafe_mode(str(path))
    config = {key: value for key, value in config.items() if key != "compile_config"}
    Classes(str(path), _imported(imports)).check(config, str(config.get("class_name")))
    with _counting(max_parameters) as asked:
        try:
            model = keras.saving.load_model(path, {OURS: BatchNormalization}, compile=False)
        except _KERAS_RAISES as error:
            if asked.parameters > max_parameters:
                raise ArchiveError(
                    "The model has more parameters than are allowed, and is not loaded",
                    where=str(path),
                    expected=f"{max_parameters} parameters at most",
                    received=f"{asked.parameters} or more",
                    remedy="raise max_parameters (--max-parameters) if you expect one so large",
                ) from error
            raise ArchiveError(
                "Keras cannot load this file", where=str(path), received=_short(error)
            ) from error
    if not isinstance(model, keras.Model):
        raise ArchiveError(
            "There is no model in this file", where=str(path), received=type(model).__name__
        )
    if keras.backend.backend() == "tensorflow":
        _check_scopes(model, str(path))
    return model


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a model as a ``.keras`` file, whole or not at all.

    Even if the process is killed meanwhile, the file is the old one or the new one; so it may also
    be the file that the model was loaded from.

    Args:
        model: The Keras model.
        path: The file, with the ending ``.keras``.

    Raises:
        OutputError: The file cannot be written; what was there is unchanged.

    Example:
        >>> import tempfile, keras
        >>> from truenorm import archive
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(model, f"{folder}/model.keras")
    """
    if Path(path).suffix != ".keras":
        raise OutputError(
            "Models are saved as .keras files",
            where=str(path),
            expected="a name that ends in .keras",
        )
    with replacing(path) as temporary:
        model.save(temporary)


def _refuse_unsafe_mode(path: str) -> None:
    from truenorm._keras_internals import in_safe_mode  # here: it imports Keras

    if in_safe_mode() is False:  # it would go over safe_mode=True
        raise ArchiveError(
            "This process has switched Keras's safe mode off, so no file is loaded in it",
            where=path,
            remedy="load it in a process without keras.config.enable_unsafe_deserialization()",
        )


def _imported(names: Collection[str]) -> frozenset[str]:
    """Import modules, and give the packages whose classes are allowed by that."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise OptionError(
                "The module with custom classes cannot be imported",
                where=name,
                received=str(error),
                remedy="give a module as Python's import takes it, importable from here",
            ) from error
    return frozenset({"keras", "truenorm", *(name.split(".")[0] for name in names)})


@dataclass
class _Asked:
    """How many numbers the variables made so far have."""

    parameters: int = 0


@contextmanager
def _counting(limit: int) -> Generator[_Asked]:
    """Count the variables that are made, each before its memory is taken; refuse past the limit.

    Keras's own code says how large a variable is; nothing in a file has to be believed for it.
    """
    import keras

    asked, kind = _Asked(), cast(Any, keras.Variable)
    original = kind.__init__

    def counted(self: Any, initializer: Any, shape: Any = None, *rest: Any, **options: Any) -> None:
        asked.parameters += abs(math.prod(shape or ()))
        if asked.parameters > limit:
            raise MemoryError("more parameters than are allowed")
        original(self, initializer, shape, *rest, **options)

    kind.__init__ = counted
    try:
        yield asked
    finally:
        kind.__init__ = original


def _check_scopes(model: Any, path: str) -> None:
    """Refuse names of layers that TensorFlow would stop at, as soon as it compiles the model."""
    from truenorm._model.graph import layer_paths

    for layer in layer_paths(model):
        if not re.fullmatch(r"[A-Za-z0-9_.\\/>-]*", layer.name):
            raise ArchiveError(
                "TensorFlow cannot run a model with a layer of this name",
                where=f"{path}: {layer.name}",
                expected="letters, digits, and _ . / > -",
                remedy="use another backend (--backend), or rename the layer",
            )


def _short(error: BaseException) -> str:
    """The beginning of a message; Keras puts whole configurations into its own."""
    text = printable(" ".join(str(error).split()).rsplit("Exception encountered: ", 1)[-1])
    return text.rstrip(".") if len(text) <= 300 else f"{text[:300]}…"
