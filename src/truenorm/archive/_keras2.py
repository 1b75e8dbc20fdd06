"""Configurations of Keras 2 as Keras 3 has them, where the meaning is certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from truenorm._errors import ArchiveError

RECURRENT = ("LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional")
IDLE: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "fused": (("BatchNormalization",), (None, True, False)),  # how it was computed, not what
    "renorm": (("BatchNormalization",), (None, False)),
    "renorm_clipping": (("BatchNormalization",), (None, {})),
    "renorm_momentum": (("BatchNormalization",), (None, 0.99)),
    "virtual_batch_size": (("BatchNormalization",), (None,)),
    "adjustment": (("BatchNormalization",), (None,)),
    "time_major": (RECURRENT, (None, False)),
    "groups": (
        ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "DepthwiseConv1D",
         "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
        (None, 1),
    ),
}  # fmt: skip
"""Settings that Keras 3 does not have in these layers, and the values at which they do nothing."""
OPERATIONS = ("TensorFlowOpLayer", "TFOpLambda", "SlicingOpLambda")
"""What Keras 2 made of TensorFlow's functions in a graph."""


def translated(entry: Any, path: str) -> Any:
    """The configuration of Keras 3 that means the same.

    Raises:
        ArchiveError: It has something whose meaning is not certain in Keras 3; it is named.
    """
    if isinstance(entry, list):
        return [translated(one, path) for one in cast(list[Any], entry)]
    if not isinstance(entry, dict):
        return entry
    made = {key: translated(one, path) for key, one in cast(dict[str, Any], entry).items()}
    kind, config = made.get("class_name"), made.get("config")
    if not isinstance(kind, str) or not isinstance(config, dict):
        return made
    config = cast(dict[str, Any], config)
    if kind in ("Policy", "PolicyV1"):
        return config.get("name")
    if kind in OPERATIONS:
        raise _unclear(path, config, kind, "layers of Keras in the place of TensorFlow's functions")
    if "name" not in config:
        config.pop("dtype", None)  # an initializer's; it follows the variable
    _settle(kind, config, path)
    return made


def single(config: dict[str, Any]) -> dict[str, Any]:
    """The same where one input and one output are no lists, as they were none in Keras 2."""
    inner = config.get("config")
    if isinstance(inner, dict):
        for name in ("input_layers", "output_layers"):
            places = cast(dict[str, Any], inner).get(name)
            if isinstance(places, list) and len(cast(list[Any], places)) == 1:
                inner[name] = places[0]
        for layer in cast(dict[str, Any], inner).get("layers", []):
            single(layer)
    return config


def _settle(kind: str, config: dict[str, Any], path: str) -> None:
    """Take the settings out that do nothing, and see that there are no others of them."""
    axis = config.get("axis")
    if kind == "BatchNormalization" and isinstance(axis, list):
        if len(cast(list[Any], axis)) != 1:
            raise _unclear(path, config, f"axis {axis}", "one axis")
        config["axis"] = axis[0]
    for setting, (kinds, idle) in IDLE.items():
        if kind in kinds and setting in config:
            if config[setting] not in idle:
                raise _unclear(path, config, f"{setting}: {config[setting]}", f"{idle[-1]}")
            del config[setting]


def _unclear(path: str, config: Mapping[str, Any], what: str, expected: str) -> ArchiveError:
    return ArchiveError(
        "The file has something of Keras 2 whose meaning is not certain in Keras 3",
        where=f"{path}: {config.get('name', 'unnamed')}",
        expected=expected,
        received=what,
        remedy="load it with the Keras that wrote it, and make the model anew in Keras 3",
    )
