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
import tempfile
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from truenorm._checks import known_options
from truenorm._errors import (
    ArchiveError,
    ModelError,
    OptionError,
    OutputError,
    is_out_of_memory,
)
from truenorm._records.files import replacing
from truenorm._records.tables import printable
from truenorm.archive._classes import Classes
from truenorm.archive._container import (
    CONFIG,
    check_links,
    numbers,
    opened,
    read_json,
    verify_checksums,
)
from truenorm.archive._isolated_loading import checked
from truenorm.archive._isolation import not_enough_memory
from truenorm.archive._keras2 import single, translated
from truenorm.archive._legacy import config_of, copied, is_legacy, opened_h5, text_attribute
from truenorm.archive._limits import MOST_PARAMETERS, memory_for

OURS = "truenorm>BatchNormalization"
"""What our layer is registered as."""

SLACK = 1_000_000
"""What a model may have beside twice the numbers that its file holds: layers with LoRA and states
are made with more than they store."""


@known_options
def load(
    path: str | os.PathLike[str],
    *,
    max_parameters: int = MOST_PARAMETERS,
    imports: Collection[str] = (),
    isolate: bool = False,
    max_memory: int | None = None,
) -> Any:
    """A model from a ``.keras`` file, or one of the old format, loaded with care.

    Before anything is made, the file is checked as :func:`truenorm.archive.read` does it, with the
    checksum of every member, and every class that it names must be one of Keras's that models are
    made of, truenorm's, or one that a module in ``imports`` registers. Keras then loads it in safe
    mode and without compiling; a variable that would pass ``max_parameters``, or what the file has
    values for, is refused before its memory is taken.

    That bounds variables only: initializers, constants and layers with states of their own take
    memory too. With ``isolate=True`` the file is loaded in a separate process first, which may take
    ``max_memory`` and five minutes, write to a temporary folder only, and (on Linux) open no
    socket; only what it could load is loaded here. It costs the time to start Keras once more.

    Args:
        path: The ``.keras`` file. One in the old format (``.h5``, Keras 2 and 3) needs
            ``isolate=True``: the separate process translates what is certain and names what is not.
        max_parameters: Most numbers that all the variables of the model may have together.
        imports: Modules of yours to import first, which register custom classes
            (``keras.saving.register_keras_serializable``). Their code runs.
        isolate: Whether a separate process with limits loads the file first.
        max_memory: Bytes of private memory that the process may take; by default 3 GiB, 64 MiB for
            each processor and 16 times the size of the file, but not more than the machine has.

    Returns:
        The model, not compiled.

    Raises:
        ArchiveError: The file is damaged or made to do harm; it holds code (``Lambda``) or names a
            class that is not allowed; it asks for too many parameters; Keras cannot load it, or
            TensorFlow not run it; the isolated process came to its limits or was ended by a fault;
            or this process is in Keras's unsafe mode.
        OptionError: A module in ``imports`` cannot be imported.

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
    memory = max_memory or memory_for([path])
    if is_legacy(path) and not isolate:
        raise ArchiveError(
            "Models in the old format are opened in a separate process only",
            where=str(path),
            expected="a .keras file, or isolate=True (--isolate)",
        )
    if not isolate:
        return load_here(path, max_parameters=max_parameters, imports=imports)
    with checked(os.fspath(path), max_parameters, imports, memory) as file:
        return load_here(file, max_parameters=max_parameters, imports=imports, shown=str(path))


def load_here(
    path: str | os.PathLike[str],
    *,
    max_parameters: int,
    imports: Collection[str],
    shown: str | None = None,
) -> Any:
    """Load a file in this process, which is the isolated one if the file is of the old format.

    Args:
        path: The file.
        max_parameters: Most numbers of all the variables.
        imports: Modules with custom classes.
        shown: What errors call the file.
    """
    if is_legacy(path):
        with tempfile.TemporaryDirectory() as folder:
            with opened_h5(path) as file:
                config = translated(config_of(file), str(path))
                if not (text_attribute(file, "keras_version") or "").startswith("3."):
                    config = single(config)
                limits = _Asked(max_parameters, SLACK + 2 * check_links(file, file, ""))
            copy = copied(path, config, Path(folder))
            return _loaded(copy, config, limits, imports, shown or str(path))
    with opened(path) as archive:
        config = read_json(archive, CONFIG)
        verify_checksums(archive)
        limits = _Asked(max_parameters, SLACK + 2 * numbers(archive))
    return _loaded(path, config, limits, imports, shown or str(path))


def _loaded(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    asked: _Asked,
    imports: Collection[str],
    shown: str,
) -> Any:
    """Have Keras load a file whose configuration was read and whose variables are in it."""
    import keras  # here, so that reading a file does not wait for it

    from truenorm._layer.batch_normalization import BatchNormalization

    _refuse_unsafe_mode(shown)
    config = {key: value for key, value in config.items() if key != "compile_config"}
    Classes(shown, _imported(imports)).check(config, str(config.get("class_name")))
    with asked.counted():
        try:
            model = keras.saving.load_model(
                path, {OURS: BatchNormalization}, compile=False, safe_mode=True
            )
        except Exception as error:
            asked.check(shown)
            if is_out_of_memory(error):
                raise not_enough_memory(shown, _short(error)) from error
            raise ArchiveError(
                "Keras cannot load this file", where=shown, received=_short(error)
            ) from error
    if not isinstance(model, keras.Model):
        raise ArchiveError(
            "There is no model in this file", where=shown, received=type(model).__name__
        )
    if keras.backend.backend() == "tensorflow":
        _check_scopes(model, shown)
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
        ModelError: It is no model.

    Example:
        >>> import tempfile, keras
        >>> from truenorm import archive
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(model, f"{folder}/model.keras")
    """
    check_name(path)
    if not hasattr(model, "save"):
        raise ModelError(
            "This is not a Keras model",
            expected="a keras.Model",
            received=type(model).__name__,
        )
    with replacing(path) as temporary:
        model.save(temporary)


def check_name(path: str | os.PathLike[str]) -> None:
    """Refuse a file that is not called as :func:`save` writes it."""
    if Path(path).suffix != ".keras":
        raise OutputError(
            "Models are saved as .keras files",
            where=str(path),
            expected="a name that ends in .keras",
        )


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
        except (Exception, SystemExit) as error:
            raise OptionError(
                "The module with custom classes cannot be imported",
                where=name,
                received=f"{type(error).__name__}: {_short(error)}",
                remedy="give a module as Python's import takes it, importable from here",
            ) from error
    return frozenset({"keras", "truenorm", *(name.split(".")[0] for name in names)})


@dataclass
class _Asked:
    """How many numbers the variables made so far have, and how many they may have.

    Keras's own code says how large a variable is; nothing in a file has to be believed for it.
    """

    allowed: int
    plausible: int
    parameters: int = 0

    @contextmanager
    def counted(self) -> Generator[None]:
        """Count the variables that are made, each before its memory is taken; refuse too many."""
        import keras

        kind = cast(Any, keras.Variable)
        original = kind.__init__

        def init(made: Any, initializer: Any, shape: Any = None, *more: Any, **how: Any) -> None:
            self.parameters += abs(math.prod(shape or ()))
            if self.parameters > min(self.allowed, self.plausible):
                raise MemoryError("more parameters than are allowed")
            original(made, initializer, shape, *more, **how)

        kind.__init__ = init
        try:
            yield
        finally:
            kind.__init__ = original

    def check(self, path: str) -> None:
        """Raise if that is why the model was not loaded."""
        if self.parameters > self.allowed:
            raise ArchiveError(
                "The model has more parameters than are allowed, and is not loaded",
                where=path,
                expected=f"{self.allowed} parameters at most",
                received=f"{self.parameters} or more",
                remedy="if it is right so, allow more: max_parameters (--max-parameters)",
            )
        if self.parameters > self.plausible:
            raise ArchiveError(
                "The model has far more parameters than the file has values, and is not loaded",
                where=path,
                expected=f"{self.plausible} parameters at most",
                received=f"{self.parameters} or more",
                remedy="do not load this file anywhere unless you know why it is so",
            )


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
