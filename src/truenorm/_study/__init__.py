"""The controlled experiment: the same model with BatchNormalization at different positions.

``folder`` says what lies where on disk; ``trial`` is one training run, in a process of its own;
``pool`` runs trials in processes; ``checks`` refuses what cannot be studied; ``analysis`` says what
the trials show; ``runner`` is the whole of it.
"""

from __future__ import annotations

from truenorm._study.pool import Progress
from truenorm._study.runner import POSITIONS, study

__all__ = ["POSITIONS", "Progress", "study"]
