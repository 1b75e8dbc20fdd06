"""Callbacks for ``fit``."""

from truenorm.callbacks._freezing import FreezeStatistics
from truenorm.callbacks._monitor import Monitor
from truenorm.callbacks._recalibrating import Recalibrate
from truenorm.callbacks._synchronizing import SyncStatistics

__all__ = ["FreezeStatistics", "Monitor", "Recalibrate", "SyncStatistics"]
