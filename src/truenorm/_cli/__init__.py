"""The ``truenorm`` command: a thin shell over the library.

Nothing heavy is imported before a command needs it, so that ``--help`` and ``inspect --static``
answer at once; and the backend is chosen before Keras is imported, which fixes it.
"""

from __future__ import annotations

import sys

from truenorm._errors import TruenormError
from truenorm._records.tables import printable

try:
    import typer
except ImportError:
    sys.exit(
        'The truenorm command needs Typer, which is not installed: pip install "truenorm[cli]"'
    )

from truenorm._cli.demo import demo
from truenorm._cli.models import diagnose, fold, inspect, place, recalibrate, replace
from truenorm._cli.study import study

app = typer.Typer(
    name="truenorm",
    help="The batch-normalization toolkit for Keras 3: where it goes, which mode it is in, "
    "whether its statistics are true.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (inspect, diagnose, place, fold, replace, recalibrate, demo):
    app.command()(command)
app.add_typer(study, name="study")


def main() -> None:
    """Run the command; an error that is truenorm's own becomes one line, Ctrl-C exit code 130."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:
        print("truenorm: There is not enough memory to run this model.", file=sys.stderr)
        sys.exit(2)
    except TruenormError as error:
        print(f"truenorm: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
