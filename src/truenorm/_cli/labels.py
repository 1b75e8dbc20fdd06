# pyright: reportMissingTypeStubs=false
"""Labels of a data file, and the loss and metrics that they are judged by.

Models are loaded without those that they were compiled with: a file may ask for code there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, cast

import typer

from truenorm._checks import meant
from truenorm._errors import OptionError

Loss = Annotated[
    str | None,
    typer.Option(
        help="The model's loss, by Keras's name, to judge it by the labels y of an .npz.",
        show_default=False,
    ),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(help="A metric, by Keras's name; may be repeated.", show_default=False),
]

FromLogits = Annotated[
    bool,
    typer.Option("--from-logits", help="The model puts out logits: the loss makes the softmax."),
]

_SHORT = ("mse", "mae", "mape", "msle")
_MADE_BY_COMPILE = ("accuracy", "acc", "crossentropy", "ce")


def check_loss(loss: str | None, metrics: Sequence[str] | None, data: Any) -> None:
    """Refuse names that Keras does not know, and a loss or metric without labels."""
    import keras

    for option, names, kind in (
        ("--loss", () if loss is None else (loss,), keras.losses),
        ("--metric", metrics or (), keras.metrics),
    ):
        for name in names:
            if name not in _MADE_BY_COMPILE or option == "--loss":
                _check_name(name, option, kind.get, dir(kind))
    if metrics and loss is None:
        raise OptionError("A metric is given without a loss", where="--metric", remedy="add --loss")
    if loss is not None and not isinstance(data, tuple | dict):
        raise _without_labels()


def _without_labels() -> OptionError:
    return OptionError(
        "A loss is given without labels",
        where="--loss",
        expected="--data with an .npz file that holds x and y, or one array per input and per "
        "output of the model, under its name (y for the only output)",
    )


def told_apart(model: Any, data: Any, loss: str | None) -> Any:
    """Inputs and labels of a file that names its arrays as the model its inputs and outputs."""
    from truenorm._model.data import input_names

    if not isinstance(data, dict):
        return data
    arrays = cast(dict[str, Any], data)
    names = input_names(model)
    inputs = {name: arrays[name] for name in names if name in arrays}
    labels = {name: values for name, values in arrays.items() if name not in inputs}
    outputs: list[str] = getattr(model, "output_names", [])
    if len(outputs) == 1 and len(labels) == 1 and {*labels} <= {"y", *outputs}:
        return inputs, *labels.values()
    if labels and {*labels} == {*outputs}:
        return inputs, labels
    if loss is not None and len(inputs) == len(names):
        raise _without_labels()
    return arrays  # of which the tools say what is missing


def compiled(model: Any, loss: Any, metrics: Sequence[str] | None) -> None:
    """Compile the model with these."""
    model.compile(loss=loss, metrics=list(metrics or ()))


def of_logits(loss: str) -> Any:
    """The loss of this name, for a model that puts out logits."""
    import keras

    names = {name.lower(): name for name in dir(keras.losses)}
    kind: Any = getattr(keras.losses, names.get(loss.replace("_", "").lower(), ""), None)
    if not isinstance(kind, type) or "from_logits" not in inspect.signature(kind).parameters:
        raise OptionError(
            "This loss knows no logits",
            where="--from-logits",
            expected="--loss with a cross-entropy, by its full name",
            received=loss,
        )
    return kind(from_logits=True)


def _check_name(name: str, option: str, get: Callable[[str], Any], known: Sequence[str]) -> None:
    try:
        get(name)
    except (ValueError, TypeError) as error:
        names = [*_SHORT, *(one for one in known if not one.startswith("_"))]
        raise OptionError(
            "Keras has nothing of this name",
            where=option,
            expected="a name such as mse or sparse_categorical_crossentropy",
            received=name,
            remedy=meant(name, names),
        ) from error
