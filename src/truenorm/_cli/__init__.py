"""The ``truenorm`` command: a thin shell over the library.

Nothing heavy is imported before a command needs it, so that ``--help`` and ``inspect --static``
answer at once; and the backend is chosen before Keras is imported, which fixes it.
"""

from truenorm._cli.app import main

__all__ = ["main"]
