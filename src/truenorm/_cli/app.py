"""All commands together, and what is said of errors and of misspelt commands."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

from truenorm._checks import meant
from truenorm._records.terminal_width import NARROW, terminal_width

try:
    import typer
except ImportError:
    sys.exit(
        'The truenorm command needs Typer, which is not installed: pip install "truenorm[cli]"'
    )

import truenorm as tn
from truenorm._cli.demo import demo
from truenorm._cli.examples import example
from truenorm._cli.isolation import isolated
from truenorm._cli.models import diagnose, fold, inspect, place, recalibrate, replace
from truenorm._cli.refusing import refuse, refusing
from truenorm._cli.study import study

app = typer.Typer(
    name="truenorm",
    help="The batch-normalization toolkit for Keras 3: where it goes, which mode it is in, "
    "whether its statistics are true.",
    epilog=example("diagnose"),
    no_args_is_help=True,
    # In Rich's columns the types of options are broken inside words where there is no room.
    rich_markup_mode="rich" if terminal_width() >= NARROW else None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command, short in (
    (inspect, "Where every BatchNormalization is, and what it does."),
    (diagnose, "Find what is wrong; exit code 1 if anything is."),
    (place, "Move them before or after the activation, or remove them."),
    (fold, "Fold them into the layers around them, for inference."),
    (replace, "Replace them by truenorm's or Keras's layer."),
    (recalibrate, "Set their moving statistics to those of a data set."),
):
    app.command(epilog=example(command.__name__), short_help=short)(isolated(command))
app.command(epilog=example("demo"), short_help="All of it on real data, with a report.")(demo)
app.add_typer(study, name="study", short_help="Train versions of a model, and say which is better.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"truenorm {tn.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version


REFUSED: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""What Typer raises about arguments; it has no public name."""


def run() -> None:
    """Run the command; an error becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        with refusing():
            sys.exit(app(standalone_mode=False, prog_name="truenorm") or 0)
    except REFUSED as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help was shown
            sys.exit(2)
        refuse(_in_our_form(error))


def _in_our_form(error: Any) -> str:
    """What Typer says about an argument, and what was meant or where to read on."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "truenorm"
    problem = " ".join(str(error.format_message()).split()).replace("Value error, ", "")
    value, _, choices = problem.rpartition(" is not one of ")
    remedy = meant(value.rpartition(": ")[2].strip("'"), re.findall(r"'([^']*)'", choices))
    remedy = remedy or f"{command} --help shows what there is"
    end = "" if problem.endswith((".", "?")) else "."
    return f"{problem}{end} Remedy: {remedy}."
