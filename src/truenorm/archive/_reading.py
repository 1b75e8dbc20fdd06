"""Read a ``.keras`` file's BatchNormalization layers without Keras and without a framework.

Keras stores a layer's variables under a path made of class names: ``layers/batch_normalization_1``
is the second layer of that class in its model, whatever it is called. :func:`_children` counts as
Keras does.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import h5py
import numpy as np

from truenorm._errors import ArchiveError
from truenorm._records.moments import Array
from truenorm._records.rewrite import Left
from truenorm._records.stored_model import Code, StoredLayer, StoredModel, StoredStatistics
from truenorm.archive._code import code_in, package_of
from truenorm.archive._container import CONFIG, METADATA, WEIGHTS, opened, read_json, weights
from truenorm.archive._legacy import (
    config_of,
    is_legacy,
    opened_h5,
    text_attribute,
    variables_of,
)

MOST_CHANNELS = 2**24


def read(path: str | os.PathLike[str]) -> StoredModel:
    """Every BatchNormalization layer of a ``.keras`` or ``.h5`` file; no model is made.

    Only the configuration and the variables of these layers are read: nothing is imported, no class
    of the file is looked up and no code in it can run. Use it for files that you do not trust. What
    a layer *does* can only be observed: :func:`truenorm.inspect`.

    Args:
        path: The ``.keras`` file, or one in the old format (``.h5``).

    Returns:
        The layers with their settings and the state of their moving statistics; prints as a table.

    Raises:
        ArchiveError: The file is damaged, is not as Keras writes it, or is made to do harm: too
            many members, too large unpacked or too deeply nested, members twice or outside of the
            archive, HDF5 links that lead elsewhere, variables missing or of the wrong shape.

    Example:
        >>> import tempfile, keras, truenorm as tn
        >>> from truenorm import archive
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(keras.Sequential([keras.Input((4,)), layer]), f"{folder}/m.keras")
        ...     found = archive.read(f"{folder}/m.keras")
        >>> [(one.path, one.channels, one.statistics.describe()) for one in found.layers]
        [('bn', 4, 'as initialised')]
    """
    if is_legacy(path):
        return _read_legacy(path)
    with opened(path) as archive:
        config = read_json(archive, CONFIG)
        about = _about(archive)
        with weights(archive) as variables:
            return _found(_Reader(variables), config, about)


def _read_legacy(path: str | os.PathLike[str]) -> StoredModel:
    with opened_h5(path) as file:
        version = text_attribute(file, "keras_version")
        return _found(_LegacyReader(file), config_of(file), (version, None))


def _found(
    reader: _Reader, config: Mapping[str, Any], about: tuple[str | None, str | None]
) -> StoredModel:
    name = _text(_object(config, "config", CONFIG).get("name", "model"), "name")
    reader.look(config, "", "")
    layers, hidden = tuple(reader.layers), tuple(reader.hidden)
    code = dict.fromkeys((path.removeprefix(f"{name}/"), what) for path, what in code_in(config))
    return StoredModel(
        name, *about, layers, hidden, tuple(Code(path or name, what) for path, what in code)
    )


@dataclass
class _Reader:
    """Walks a configuration beside the variables that belong to it."""

    variables: h5py.File
    layers: list[StoredLayer] = field(default_factory=list[StoredLayer])
    hidden: list[Left] = field(default_factory=list[Left])

    def look(self, entry: Mapping[str, Any], path: str, store: str) -> None:
        """Read one layer, and the ones inside it."""
        kind = _text(entry.get("class_name"), f"{path or CONFIG}: class_name")
        package = self._package(entry)
        if package is None:
            self.hidden.append(Left(path or "the model", f"of a class that is not Keras's: {kind}"))
        elif kind == "BatchNormalization" and self._is_stored_elsewhere(entry, store):
            self.hidden.append(Left(path, "stored with another model that shares it"))
        elif kind == "BatchNormalization":
            self.layers.append(self._layer(entry, path, store, package))
        else:
            for child, below in _children(entry, path):
                own = _object(child, "config", path).get("name", child.get("name"))
                name = _text(own, f"{path or CONFIG}: name of {below}")
                self.look(child, f"{path}/{name}" if path else name, f"{store}{below}/")

    def _is_stored_elsewhere(self, entry: Mapping[str, Any], store: str) -> bool:
        """Whether this is a later occurrence of a shared layer (Keras cannot load such a file)."""
        return "shared_object_id" in entry and f"{store}vars" not in self.variables

    def _layer(self, entry: Mapping[str, Any], path: str, store: str, package: str) -> StoredLayer:
        config = _object(entry, "config", path)
        mean, variance = self._statistics(entry, config, path, store)
        momentum = config.get("momentum", 0.99)
        trainable = _kind(config.get("trainable", True), bool, f"{path}: trainable")
        policy = _text(config.get("freeze") or "none", f"{path}: freeze")
        return StoredLayer(
            path=path,
            layer=f"{package}.BatchNormalization",
            axis=_axis(config.get("axis", -1), path),
            channels=mean.shape[-1],
            momentum=None if momentum is None else _number(momentum, f"{path}: momentum"),
            epsilon=_number(config.get("epsilon", 1e-3), f"{path}: epsilon"),
            trainable=trainable,
            policy=policy if trainable else "all",
            dtype=_dtype(config.get("dtype"), path),
            statistics=_summary(mean, variance),
            activation=_activation(config.get("activation"), path),
        )

    def _statistics(
        self, entry: Mapping[str, Any], config: Mapping[str, Any], path: str, store: str
    ) -> tuple[Array, Array]:
        """Moving mean and variance; all the variables must be there and of one length."""
        flags = [_kind(config.get(key, True), bool, f"{path}: {key}") for key in _LEARNED]
        first = sum(flags)
        values = self._values(first + 2, path, store, _domains(config, path))
        lengths = {value.shape[-1] for value in values} | _declared(entry, config, path)
        if len(lengths) != 1:
            raise ArchiveError(
                "The variables of this layer do not fit each other",
                where=path,
                expected="one value per channel in each",
                received=f"lengths {sorted(lengths)}",
            )
        return values[first], values[first + 1]

    def _package(self, entry: Mapping[str, Any]) -> str | None:
        return _package(entry)

    def _values(self, count: int, path: str, store: str, domains: int | None) -> list[Array]:
        """The variables of a layer, the moving mean and variance last."""
        return [self._variable(f"{store}vars/{index}", path, domains) for index in range(count)]

    def _variable(self, name: str, path: str, domains: int | None) -> Array:
        found = self.variables.get(name)
        if not isinstance(found, h5py.Dataset):
            raise ArchiveError(
                "A variable of this layer is missing",
                where=path,
                expected=f"{WEIGHTS}/{name}",
                remedy="save the file again from the model",
            )
        is_bfloat16 = found.attrs.get("dtype") == "bfloat16"
        shape = cast(tuple[int, ...], found.shape or ())
        single = len(shape) == 1 or (len(shape) == 2 and shape[0] == domains)
        if not single or math.prod(shape) > MOST_CHANNELS or not _is_float(found, is_bfloat16):
            raise ArchiveError(
                "A variable of this layer is not one number per channel",
                where=path,
                expected=f"a float vector of {MOST_CHANNELS} channels at most",
                received=f"shape {shape}, dtype {found.dtype}",
            )
        values = np.asarray(found[()])
        if is_bfloat16:  # the upper half of a float32
            values = (values.view("<u2").astype("<u4") << 16).view("<f4")
        return values.astype(np.float64)


class _LegacyReader(_Reader):
    """The same for the old format, which has variables by their names."""

    def _package(self, entry: Mapping[str, Any]) -> str | None:
        """Keras 2 names no module; a class of somebody else's is registered as ``Package>Name``."""
        if entry.get("module") is None:
            return None if ">" in str(entry.get("class_name")) else "keras"
        return _package(entry)

    def _is_stored_elsewhere(self, entry: Mapping[str, Any], store: str) -> bool:
        del entry, store
        return False

    def _values(self, count: int, path: str, store: str, domains: int | None) -> list[Array]:
        del store, domains  # The format is older than them.
        found = variables_of(self.variables, path, path.rsplit("/", 1)[-1]) or {}
        names = [
            *(name for name in ("gamma", "beta") if name in found),
            "moving_mean",
            "moving_variance",
        ]
        if len(names) != count or not all(name in found for name in names):
            raise ArchiveError(
                "The variables of this layer are missing or not told apart",
                where=path,
                expected="gamma, beta, moving_mean and moving_variance under the layer's name",
                received=", ".join(sorted(found)) or "none",
            )
        values = [found[name] for name in names]
        if any(value.ndim != 1 or len(value) > MOST_CHANNELS for value in values):
            raise ArchiveError(
                "A variable of this layer is not one number per channel",
                where=path,
                expected=f"a float vector of {MOST_CHANNELS} channels at most",
                received=", ".join(str(value.shape) for value in values),
            )
        return values


_LEARNED = ("scale", "center")


def _children(entry: Mapping[str, Any], path: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The layers inside a model or a wrapper, each with the place of its variables."""
    where = f"{path or CONFIG}: layers"
    config = entry.get("config")
    if not isinstance(config, dict):
        return
    config = cast(dict[str, Any], config)
    if isinstance(config.get("layer"), dict):  # TimeDistributed and other wrappers
        yield config["layer"], "layer"
    counts: Counter[str] = Counter()
    for child in cast(list[Any], _kind(config.get("layers", []), list, where)):
        child = _kind(child, dict, where)
        name = _snake_case(_text(child.get("class_name"), where))
        if not _text(child.get("module") or "", where).startswith("keras.src.ops"):
            number, counts[name] = counts[name], counts[name] + 1
            yield child, f"layers/{name}_{number}" if number else f"layers/{name}"


@lru_cache(1024)
def _snake_case(name: str) -> str:
    """A class's name as Keras makes a path of it (``keras.src.utils.naming``)."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _package(entry: Mapping[str, Any]) -> str | None:
    """Keras's or ours; None for a custom class."""
    package = package_of(entry.get("module"))
    return package if package in ("keras", "truenorm") else None


def _about(archive: zipfile.ZipFile) -> tuple[str | None, str | None]:
    """Who wrote the file and when, as it says itself."""
    if METADATA not in archive.namelist():
        return None, None
    metadata = read_json(archive, METADATA)
    version, date = (metadata.get(key) for key in ("keras_version", "date_saved"))
    return (
        version if isinstance(version, str) else None,
        date if isinstance(date, str) else None,
    )


def _declared(entry: Mapping[str, Any], config: Mapping[str, Any], path: str) -> set[int]:
    """The number of channels by the shape that the layer was built for, if the file has it."""
    build = entry.get("build_config")
    shape = cast(dict[str, Any], build).get("input_shape") if isinstance(build, dict) else None
    axis = _axis(config.get("axis", -1), path)
    if not isinstance(shape, list) or not -len(shape) <= axis < len(shape):
        return set()
    channels = cast(list[Any], shape)[axis]
    return {channels} if isinstance(channels, int) else set()


def _summary(mean: Array, variance: Array) -> StoredStatistics:
    finite = np.isfinite(mean) & np.isfinite(variance)
    means, variances = np.abs(mean[np.isfinite(mean)]), variance[np.isfinite(variance)]
    return StoredStatistics(
        initial=bool((mean == 0).all() and (variance == 1).all()),
        negative=int((variance < 0).sum()),
        non_finite=int((~finite).sum()),
        largest_mean=float(means.max()) if means.size else None,
        least_variance=float(variances.min()) if variances.size else None,
        largest_variance=float(variances.max()) if variances.size else None,
    )


def _is_float(variable: h5py.Dataset, is_bfloat16: bool) -> bool:
    return variable.dtype.itemsize == 2 if is_bfloat16 else variable.dtype.kind == "f"


def _axis(value: Any, path: str) -> int:
    if isinstance(value, list) and len(cast(list[Any], value)) == 1:  # as tf.keras wrote it
        value = cast(list[Any], value)[0]
    return _kind(value, int, f"{path}: axis")


def _domains(config: Mapping[str, Any], path: str) -> int | None:
    """How many rows the variables have that a layer with domains has for each."""
    domains = config.get("domains")
    return None if domains is None else _kind(domains, int, f"{path}: domains")


def _activation(value: Any, path: str) -> str | None:
    """The name of an activation, which may be written as an object."""
    if isinstance(value, dict):
        found = cast(dict[str, Any], value)
        value = found.get("config")
        value = value if isinstance(value, str) else found.get("class_name")
    return None if value in (None, "linear") else _text(value, f"{path}: activation")


def _dtype(value: Any, path: str) -> str:
    """The name of a dtype policy, which may be written as an object."""
    if value is None:
        return "float32"
    if isinstance(value, dict):
        inner = _object(cast(dict[str, Any], value), "config", f"{path}: dtype")
        value = inner.get("name", cast(dict[str, Any], value).get("class_name"))
    return _text(value, f"{path}: dtype")


def _object(entry: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    return _kind(entry.get(key), dict, f"{where or CONFIG}: {key}")


def _text(value: Any, where: str) -> str:
    return _kind(value, str, where)


def _number(value: Any, where: str) -> float:
    return float(value) if type(value) is int else _kind(value, float, where)


def _kind(value: Any, kind: type, where: str) -> Any:
    """A part of the configuration, if it is of the kind that Keras writes there."""
    if not isinstance(value, kind):
        raise ArchiveError(
            "The configuration in the file is not as Keras writes it",
            where=where,
            expected=f"a value of type {kind.__name__}",
            received=repr(value)[:100],
        )
    return value
