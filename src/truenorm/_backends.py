"""Keras's backends that truenorm works on; a file of its own, as one is chosen before Keras."""

from __future__ import annotations

from enum import StrEnum


class Backend(StrEnum):
    """Keras's backends that truenorm works on."""

    jax = "jax"
    tensorflow = "tensorflow"
    torch = "torch"
