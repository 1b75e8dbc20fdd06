"""truenorm: the batch-normalization toolkit for Keras 3.

Public names stand in the stub beside this file (``__init__.pyi``) and are loaded when they are
first used: so ``truenorm --help`` and other commands that need no model do not wait for Keras.
"""

import lazy_loader

from truenorm._registration import register_layer

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
register_layer()
del register_layer
