"""``.keras`` files that you may not trust: read without running anything, loaded within limits.

:func:`read` imports neither Keras nor a framework: it reads the configuration and the variables of
the BatchNormalization layers. :func:`load` makes the model, after the file has been checked.
:func:`save` replaces a file only by a whole one.
"""

from truenorm._records.stored_model import StoredLayer, StoredModel
from truenorm.archive._loading import MOST_PARAMETERS, load, save
from truenorm.archive._reading import read

__all__ = ["MOST_PARAMETERS", "StoredLayer", "StoredModel", "load", "read", "save"]
