"""The command ``truenorm study``: run one, show one, merge several."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from truenorm._checks import meant
from truenorm._cli.backend_and_model import AsJson, Imports, OnBackend, choose_backend
from truenorm._cli.examples import example
from truenorm._cli.files import Force, check_free
from truenorm._cli.output import show
from truenorm._errors import OptionError
from truenorm._records.tables import printable


class _RunUnlessNamed(TyperGroup):
    """``truenorm study MODEL`` runs; ``show`` and ``merge`` are commands of their own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "-h"):
            remedy = None if "--data" in args else meant(args[0], self.commands)
            if remedy is not None:
                raise OptionError("There is no such command", where=args[0], remedy=remedy)
            args = ["run", *args]
        return super().parse_args(ctx, args)


study = typer.Typer(
    cls=_RunUnlessNamed,
    help="Train versions of a model side by side, and say which is better.\n\n"
    "truenorm study MODEL --data DATA --epochs N --out DIR",
    epilog=example("study run"),
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="A study's folder.", show_default=False)]
Report = Annotated[
    Path | None, typer.Option(help="Write a report: one HTML file.", show_default=False)
]


@study.command(
    epilog=example("study run"), short_help="Run a study, or go on with one that was stopped."
)
def run(
    model: Annotated[
        str,
        typer.Argument(
            help="mlp, cnn or resnet (with sizes: mlp:64-64); a .keras file; package.module:build; "
            "or applications:ResNet50.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="digits, breast_cancer, wine, diabetes; keras:mnist; FILE.npz; FILE.csv:TARGET; a "
            "folder with a folder of images per class; or package.module:function of the seed.",
            show_default=False,
        ),
    ],
    epochs: Annotated[int, typer.Option(min=1, show_default=False)],
    out: Annotated[Path, typer.Option(help="The study's folder.", show_default=False)],
    positions: Annotated[
        str, typer.Option(help="Positions, with commas between them; not with --variants.")
    ] = "none,before_activation,after_activation",
    variants: Annotated[
        str | None,
        typer.Option(
            help="In place of positions: these, and the conversions group (group:16 with 16 "
            "groups), layer, affine, truenorm, keras, with commas between them.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of each variant.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    learning_rate: Annotated[
        float, typer.Option(help="Adam's, for models that are built by their name.")
    ] = 1e-3,
    activation: Annotated[str, typer.Option(help="Of mlp, cnn and resnet.")] = "relu",
    image_size: Annotated[
        int, typer.Option(min=8, help="Images of a folder are resized to this height and width.")
    ] = 64,
    margin: Annotated[
        float | None, typer.Option(help="Smallest difference of interest, such as 0.005.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Count the epochs until the metric is this good.")
    ] = None,
    runner: Annotated[
        str,
        typer.Option(help="local, here (in this process), ray, or the address of a Ray cluster."),
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trials at once; else one per core.")
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="Of each Ray task.")] = None,
    gpus: Annotated[float | None, typer.Option(help="Of each Ray task.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Longest time of a trial, seconds.")] = None,
    report: Report = None,
    force: Force = False,
    as_json: AsJson = False,
    backend: OnBackend = None,
    imports: Imports = None,
) -> None:
    """Run a study, or go on with one that was stopped; its folder keeps all results."""
    _check_report(report, force=force)
    choose_backend(backend)
    sys.path.append(os.getcwd())  # noqa: PTH109 - a module of the user's is most often there
    from rich.console import Console

    from truenorm._study import study as run_study
    from truenorm._study.datasets import Ready, absolute
    from truenorm._study.live import live
    from truenorm._study.models import FAMILIES, build_of

    kind = model.partition(":")[0]
    named = kind in FAMILIES or kind == "applications" or model.endswith(".keras")
    options: dict[str, Any] = {
        "learning_rate": learning_rate,
        "activation": activation,
        "imports": tuple(imports or ()),
    }
    resources = {"num_cpus": cpus, "num_gpus": gpus}
    ready = Ready(absolute(data), (image_size, image_size))
    is_function = not Path(data).exists() and not ready.is_known()
    with live(Console(highlight=False, stderr=True)) as on_event:
        found = run_study(
            build_of(model, **(options if named else {})),
            build_of(data) if is_function else ready,
            positions=_names(positions),
            variants=None if variants is None else _names(variants),
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            margin=margin,
            threshold=threshold,
            directory=out,
            name=f"{model} on {data}",
            workers=workers,
            timeout=timeout,
            runner=runner,
            resources={name: value for name, value in resources.items() if value is not None},
            on_event=on_event,
        )
    _finish(found, report, as_json=as_json)


@study.command("show", epilog=example("study show"))
def show_study(
    folder: Folder, report: Report = None, force: Force = False, as_json: AsJson = False
) -> None:
    """Show the study in a folder, finished or not; nothing is run."""
    _check_report(report, force=force)
    choose_backend(None)
    from truenorm._study.load_and_merge import load

    _finish(load(folder), report, as_json=as_json)


@study.command(epilog=example("study merge"))
def merge(
    folder: Annotated[Path, typer.Argument(help="The folder to merge into.", show_default=False)],
    others: Annotated[
        list[Path], typer.Argument(help="Folders of the same study.", show_default=False)
    ],
) -> None:
    """Merge folders of one study whose seeds were divided among machines."""
    choose_backend(None)
    from truenorm._study.load_and_merge import merge as merge_folders

    if folder.resolve() in [other.resolve() for other in others]:
        raise OptionError("A folder cannot be merged into itself", where=str(folder))
    merge_folders(folder, *others)
    print(f"Merged into {printable(str(folder))}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _check_report(path: Path | None, *, force: bool) -> None:
    if path is not None:
        check_free(path, force=force, ending=".html")


def _finish(found: Any, path: Path | None, *, as_json: bool) -> None:
    show(found, as_json=as_json)
    if path is not None:
        from truenorm.report import save, study_page

        save(path, study_page(found))
        if not as_json:
            print(f"Report: {printable(str(path))}")
