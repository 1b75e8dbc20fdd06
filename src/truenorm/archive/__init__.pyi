from ._limits import MOST_PARAMETERS as MOST_PARAMETERS
from ._loading import load as load
from ._loading import save as save
from ._reading import StoredLayer as StoredLayer
from ._reading import StoredModel as StoredModel
from ._reading import read as read

__all__ = ["MOST_PARAMETERS", "StoredLayer", "StoredModel", "load", "read", "save"]
