"""``.keras`` files that you may not trust: read without running anything, loaded within limits.

:func:`read` imports neither Keras nor a framework: it reads the configuration and the variables of
the BatchNormalization layers. :func:`load` makes the model, after the file has been checked.
:func:`save` replaces a file only by a whole one.

The names stand in the stub beside this file and are loaded when they are first used: a command that
opens no file waits for neither NumPy nor h5py.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
