"""The list of classes that a configuration may name: parts of models, nothing that holds code.

Keras looks a class up by its module, by the name it is registered under, and in older files by its
bare name; an entry can give all three. So each of them must be harmless.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from truenorm._errors import ArchiveError
from truenorm.archive._code import CODE
from truenorm.archive._limits import MOST_BATCH

AREAS = frozenset(
    {"activations", "constraints", "dtype_policies", "initializers", "layers", "losses", "metrics",
     "models", "ops", "optimizers", "quantizers", "random", "regularizers"}
)  # fmt: skip
"""The parts of Keras that a model is made of; not its file, data and network functions."""

TOOLS = frozenset(
    {"deserialize", "get", "serialize", "clone_model", "load_model", "model_from_json",
     "save_model"}
)  # fmt: skip
"""Functions in these parts that are no part of a model, but make, read and write models."""

VALUES = frozenset(
    {"__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__slice__", "__ellipsis__"}
)
"""What Keras writes for values that are not JSON."""

NUMBERS = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
     "bfloat16", "float32", "float64", "complex64", "complex128"}
)  # fmt: skip
"""What a constant may consist of: NumPy also knows text of a billion letters."""


@dataclass(frozen=True)
class Classes:
    """Which classes a file may name."""

    path: str
    packages: Collection[str]

    def check(self, value: Any, where: str) -> None:
        """Refuse a configuration that names any other, at any depth."""
        if isinstance(value, dict):
            entry = cast(dict[str, Any], value)
            config = entry.get("config")
            if isinstance(config, dict):
                where = str(cast(dict[str, Any], config).get("name", where))
            self._check_batch(entry, where)
            if "class_name" in entry:
                self._check_entry(entry, where)
                self._check_constant(entry, where)
            for inner in entry.values():
                self.check(inner, where)
        elif isinstance(value, list):
            for inner in cast(list[Any], value):
                self.check(inner, where)

    def _check_batch(self, entry: Mapping[str, Any], where: str) -> None:
        """Keras allocates a stateful layer's states at once, and not as variables."""
        for shape in (entry.get("batch_shape"), entry.get("input_shape")):
            batch = cast(list[Any], shape)[0] if isinstance(shape, list) and shape else None
            if isinstance(batch, int | float) and batch > MOST_BATCH:
                raise ArchiveError(
                    "The model is fixed to batches of a size that is not allowed",
                    where=f"{self.path}: {where}",
                    expected=f"{MOST_BATCH} samples at most",
                    received=str(batch)[:20],
                )

    def _check_constant(self, entry: Mapping[str, Any], where: str) -> None:
        config = entry.get("config")
        if entry["class_name"] not in ("__numpy__", "__tensor__") or not isinstance(config, dict):
            return
        dtype = cast(dict[str, Any], config).get("dtype")
        if dtype not in NUMBERS:
            raise ArchiveError(
                "A constant in the file does not consist of numbers",
                where=f"{self.path}: {where}",
                expected="a type such as float32",
                received=str(dtype)[:40],
            )

    def _check_entry(self, entry: Mapping[str, Any], where: str) -> None:
        import keras

        registered = keras.saving.get_custom_objects()
        name, *others = (
            value if isinstance(value, str) else ""
            for value in map(entry.get, ("class_name", "registered_name", "config"))
        )
        if name in CODE:
            raise ArchiveError(
                "The file holds code, which is not run",
                where=f"{self.path}: {where}",
                expected="layers of Keras or truenorm that are described by their settings",
                received=name,
                remedy="'truenorm inspect --static' reads the file without running it; one that "
                "you made yourself loads in Python: keras.models.load_model(file, safe_mode=False)",
            )
        custom = {one: registered[one] for one in (name, *others) if one in registered}
        looked_up = others[1] if name == "function" else others[0] or name
        is_known = looked_up in custom or name in VALUES or _is_kerass(entry)
        if not (is_known and all(_package(one) in self.packages for one in custom.values())):
            raise ArchiveError(
                "The file needs a class that is not Keras's or truenorm's",
                where=f"{self.path}: {where}",
                expected="a class of Keras or truenorm, or of a module that you name",
                received=f"{entry.get('registered_name') or name} of {entry.get('module')}",
                remedy="if you trust its code, import it: imports=('module',) (--import module)",
            )


def _package(custom: Any) -> str:
    return str(getattr(custom, "__module__", "")).split(".")[0]


def _is_kerass(entry: Mapping[str, Any]) -> bool:
    """Whether this is a class of Keras that models are made of."""
    module = entry.get("module")
    if TOOLS & {str(entry.get("class_name")), str(entry.get("config"))}:
        return False
    if module is None:
        return not entry.get("registered_name")  # Keras then looks in its own tables only
    if module == "keras" or (entry.get("class_name") == "function" and module == "builtins"):
        return True
    if not isinstance(module, str):
        return False
    if module.startswith("keras.src.applications."):  # layers of theirs; Keras takes classes only
        return entry.get("class_name") != "function"
    parts = [part for part in module.split(".") if part != "src"]
    return len(parts) > 1 and parts[0] == "keras" and parts[1] in AREAS
