"""truenorm: the batch-normalization toolkit for Keras 3.

Names are loaded when they are first used (PEP 562): so ``truenorm --help`` and other commands that
need no model answer without waiting for Keras.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truenorm import callbacks
    from truenorm._adaptation import adapt
    from truenorm._diagnosis import diagnose
    from truenorm._errors import (
        ArchiveError,
        DataError,
        MissingDependencyError,
        ModelError,
        OptionError,
        OutputError,
        StudyError,
        TruenormError,
        VerificationError,
    )
    from truenorm._folding import fold
    from truenorm._freezing import freeze, unfreeze
    from truenorm._inspection import inspect
    from truenorm._layer import BatchNormalization
    from truenorm._moments import Moments
    from truenorm._observation import observe
    from truenorm._placement import place
    from truenorm._population import collect, recalibrate
    from truenorm._records.findings import Diagnosis, Finding
    from truenorm._records.rewrites import Rewrite
    from truenorm._records.sites import Freezing, Inspection, Observation, Site
    from truenorm._records.statistics import Population, Recalibration
    from truenorm._records.studies import Study
    from truenorm._replacement import replace
    from truenorm._study import study

__version__ = "0.1.0"

_HOMES = {
    "_adaptation": ("adapt",),
    "_errors": (
        "ArchiveError",
        "DataError",
        "MissingDependencyError",
        "ModelError",
        "OptionError",
        "OutputError",
        "StudyError",
        "TruenormError",
        "VerificationError",
    ),
    "_diagnosis": ("diagnose",),
    "_folding": ("fold",),
    "_freezing": ("freeze", "unfreeze"),
    "_inspection": ("inspect",),
    "_layer": ("BatchNormalization",),
    "_moments": ("Moments",),
    "_observation": ("observe",),
    "_placement": ("place",),
    "_population": ("collect", "recalibrate"),
    "_records.findings": ("Diagnosis", "Finding"),
    "_records.rewrites": ("Rewrite",),
    "_records.sites": ("Freezing", "Inspection", "Observation", "Site"),
    "_records.statistics": ("Population", "Recalibration"),
    "_records.studies": ("Study",),
    "_replacement": ("replace",),
    "_study": ("study",),
}
_MODULES = ("callbacks",)
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArchiveError",
    "BatchNormalization",
    "DataError",
    "Diagnosis",
    "Finding",
    "Freezing",
    "Inspection",
    "MissingDependencyError",
    "ModelError",
    "Moments",
    "Observation",
    "OptionError",
    "OutputError",
    "Population",
    "Recalibration",
    "Rewrite",
    "Site",
    "Study",
    "StudyError",
    "TruenormError",
    "VerificationError",
    "adapt",
    "callbacks",
    "collect",
    "diagnose",
    "fold",
    "freeze",
    "inspect",
    "observe",
    "place",
    "recalibrate",
    "replace",
    "study",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"truenorm.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'truenorm' has no attribute '{name}'")
    value = getattr(import_module(f"truenorm.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
