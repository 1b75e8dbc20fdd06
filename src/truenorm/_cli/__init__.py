"""The ``truenorm`` command: a thin shell over the library.

Nothing heavy is imported before a command needs it, so that ``--help`` and ``inspect --static``
answer at once; and the backend is chosen before Keras is imported, which fixes it.
"""


def main() -> None:
    """Run the command; a static reading without Typer."""
    import sys

    from truenorm._cli import static
    from truenorm._cli.refusing import refusing

    file = static.plain(sys.argv[1:])
    if file is not None:
        with refusing():
            sys.exit(static.read_apart(file, as_json="--json" in sys.argv))
    from truenorm._cli.app import run

    run()
