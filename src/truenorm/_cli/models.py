"""The commands on one model in a file: inspect, diagnose, place, fold, replace, recalibrate."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import truenorm as tn
from truenorm._cli.backend_and_model import (
    AsJson,
    BatchSize,
    File,
    Imports,
    MaxParameters,
    OnBackend,
    choose_backend,
    model_of,
)
from truenorm._cli.files import Out
from truenorm._cli.labels import (
    FromLogits,
    Loss,
    Metrics,
    check_loss,
    compiled,
    of_logits,
    told_apart,
)
from truenorm._cli.output import note, show, write
from truenorm._cli.remedies import receipt_with_commands, with_commands
from truenorm.archive._limits import MOST_PARAMETERS


class Position(StrEnum):
    """Where BatchNormalization can be put."""

    before_activation = "before_activation"
    after_activation = "after_activation"
    before_layer = "before_layer"
    none = "none"


class Layer(StrEnum):
    """Which BatchNormalization: truenorm's or Keras's."""

    truenorm = "truenorm"
    keras = "keras"


class Upstream(StrEnum):
    """Which statistics the layers before a layer use while its own are taken."""

    batch = "batch"
    population = "population"
    moving = "moving"


Probe = Annotated[
    Path | None,
    typer.Option(
        help="Inputs to run the model on: a .npy, .npz or .csv file; else they are made up.",
        show_default=False,
    ),
]
Where = Annotated[
    str | None, typer.Option(help="Only layers whose path matches a pattern such as 'block1/*'.")
]


def inspect(
    file: File,
    static: Annotated[
        bool,
        typer.Option(
            "--static", help="Only read the file: no Keras, no model, no code of the file."
        ),
    ] = False,
    data: Probe = None,
    as_json: AsJson = False,
    backend: OnBackend = None,
    max_parameters: MaxParameters = MOST_PARAMETERS,
    imports: Imports = None,
) -> None:
    """Show every BatchNormalization of a model: where it is, and what it does in each mode."""
    if static:
        show(tn.archive.read(file), as_json=as_json)
    else:
        inputs = _probe(data)
        model = model_of(file, backend, max_parameters, imports)
        show(tn.inspect(model, inputs), as_json=as_json)


def diagnose(
    file: File,
    data: Annotated[
        Path | None,
        typer.Option(help="Training data: a .npy or .csv file of inputs, or .npz with x and y."),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(help="Only rules whose code begins with this, such as TN1; may be repeated."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out rules whose code begins with this, such as TN302; may be repeated."
        ),
    ] = None,
    loss: Loss = None,
    from_logits: FromLogits = False,
    metric: Metrics = None,
    batch_size: BatchSize = 32,
    as_json: AsJson = False,
    backend: OnBackend = None,
    max_parameters: MaxParameters = MOST_PARAMETERS,
    imports: Imports = None,
) -> None:
    """Find what is wrong with BatchNormalization; exit code 1 if there are warnings or errors."""
    arrays = None if data is None else _arrays(data)
    choose_backend(backend)
    from truenorm._diagnosis.diagnose import selection

    selection(select, ignore)
    check_loss(loss, metric, arrays)
    judged_by: Any = of_logits(loss or "") if from_logits else loss
    model = model_of(file, backend, max_parameters, imports)
    arrays = told_apart(model, arrays, loss)
    if loss is not None:
        compiled(model, judged_by, metric)
    elif isinstance(arrays, tuple):
        note(f"The labels in {data} are not used. Remedy: add --loss, with the model's own.")
    found = tn.diagnose(model, arrays, select=select, ignore=ignore, batch_size=batch_size)
    show(found if as_json else with_commands(found, file, data), as_json=as_json)
    raise typer.Exit(0 if found.clean else 1)


def place(
    file: File,
    position: Annotated[Position, typer.Argument(help="Where to put it.", show_default=False)],
    out: Out,
    where: Where = None,
    insert: Annotated[
        bool,
        typer.Option("--insert", help="Also add one for each convolution or dense layer without."),
    ] = False,
    as_json: AsJson = False,
    backend: OnBackend = None,
    max_parameters: MaxParameters = MOST_PARAMETERS,
    imports: Imports = None,
) -> None:
    """Move every BatchNormalization before or after its activation, remove or insert it."""
    model = model_of(file, backend, max_parameters, imports)
    rewrite = tn.place(model, position.value, where=where, insert=insert)
    _finish(rewrite, out, as_json=as_json)


def fold(
    file: File,
    out: Out,
    where: Where = None,
    data: Probe = None,
    as_json: AsJson = False,
    backend: OnBackend = None,
    max_parameters: MaxParameters = MOST_PARAMETERS,
    imports: Imports = None,
) -> None:
    """Fold every BatchNormalization into the layers around it, for inference."""
    probe = _probe(data)
    model = model_of(file, backend, max_parameters, imports)
    _finish(tn.fold(model, where=where, probe=probe), out, as_json=as_json)


def replace(
    file: File,
    out: Out,
    to: Annotated[Layer, typer.Option(help="Which layer to use instead.")] = Layer.truenorm,
    fuse: Annotated[
        bool,
        typer.Option("--fuse", help="Take in the ReLU behind each, and a residual sum before it."),
    ] = False,
    data: Probe = None,
    as_json: AsJson = False,
    backend: OnBackend = None,
    max_parameters: MaxParameters = MOST_PARAMETERS,
    imports: Imports = None,
) -> None:
    """Replace every BatchNormalization by truenorm's or Keras's, keeping weights and outputs."""
    probe = _probe(data)
    model = model_of(file, backend, max_parameters, imports)
    _finish(tn.replace(model, to=to.value, fuse=fuse, probe=probe), out, as_json=as_json)


def recalibrate(
    file: File,
    data: Annotated[
        Path, typer.Option(help="The inputs: a .npy, .npz or .csv file.", show_default=False)
    ],
    out: Out,
    upstream: Annotated[
        Upstream,
        typer.Option(help="Which statistics earlier layers use while a layer's are taken."),
    ] = Upstream.batch,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Only layers whose path matches a pattern such as 'block1/*'; may be repeated."
        ),
    ] = None,
    batch_size: BatchSize = 32,
    as_json: AsJson = False,
    backend: OnBackend = None,
    max_parameters: MaxParameters = MOST_PARAMETERS,
    imports: Imports = None,
) -> None:
    """Set the moving statistics to the mean and variance of a whole data set."""
    arrays = _arrays(data)
    model = model_of(file, backend, max_parameters, imports)
    done = tn.recalibrate(
        model, arrays, upstream=upstream.value, batch_size=batch_size, layers=layers or None
    )
    show(done, as_json=as_json)
    write(model, out, as_json=as_json)


def _arrays(data: Path) -> Any:
    from truenorm._cli.data import read_data  # here: it imports NumPy

    return read_data(data)


def _probe(data: Path | None) -> Any:
    """A few of the inputs, if there are any."""
    if data is None:
        return None
    from truenorm._cli.data import few_inputs

    return few_inputs(_arrays(data))


def _finish(rewrite: tn.Rewrite, out: Path, *, as_json: bool) -> None:
    show(rewrite if as_json else receipt_with_commands(rewrite, out), as_json=as_json)
    write(rewrite.model, out, as_json=as_json)
