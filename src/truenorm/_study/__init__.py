"""The controlled experiment: the same model with BatchNormalization at different positions.

``experiment`` is the whole of it: ``checks`` refuses what cannot be studied, ``settings`` says what
decides the result, ``folder`` what lies where on disk; ``pool`` starts and ends the processes,
``trial`` is one training run in one of them, ``progress`` what they tell meanwhile; ``analysis``
judges the trials, ``verdict`` says it in sentences.
"""

from __future__ import annotations

from truenorm._study.experiment import POSITIONS, study
from truenorm._study.progress import Progress

__all__ = ["POSITIONS", "Progress", "study"]
