"""truenorm: the batch-normalization toolkit for Keras 3, on JAX, TensorFlow and PyTorch.

Which mode is it in?
    inspect(model)                every BatchNormalization: where it is, what it does in each mode
    observe(model)                the same of your own code, while a block is open
    freeze(model), unfreeze(…)    what does not learn: all, the statistics, or gamma and beta

Are its statistics true?
    collect(model, data)          mean and variance over a whole data set
    recalibrate(model, data)      put into the moving statistics; adapt(…) for another domain

What is wrong?
    diagnose(model, data)         findings, each with the call that mends it

Where does it go?
    place(model, position)        before the activation, after it, before the layer, or nowhere
    study(build, data, epochs=…)  which of them is better: trained side by side; Variant for others

For deployment:
    fold(model)                   into the layers around it
    replace(model, to=…)          Keras's layer and truenorm's, one for the other

The layer: BatchNormalization, with domains (domain) and in recomputed passes (remat). In fit: the
callbacks; sync_statistics makes the statistics of several processes one. Files that you may not
trust: archive. Statistics on Ray: cluster. Pages in HTML: report. What a tool returns is a record:
it prints as tables, and has to_dict(), to_json() and from_json(). Every error is a TruenormError.

The names stand in the stub beside this file (``__init__.pyi``) and are loaded when they are first
used: so ``truenorm --help`` and other commands that need no model do not wait for Keras.
"""

import lazy_loader

from truenorm._registration import register_layer

__version__ = "0.1.0"

_load, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """A public name, loaded now; one that is misspelt is answered with the one that was meant."""
    if name in __all__:
        return _load(name)
    from truenorm._checks import meant

    remedy = meant(name, __all__)
    raise AttributeError(
        f"truenorm has no attribute '{name}'." + (f" Remedy: {remedy}." if remedy else "")
    )


def __dir__() -> list[str]:
    """The public names; none for ``help(truenorm)``, which would print each of them in full."""
    from inspect import currentframe

    callers: list[str | None] = []
    frame = currentframe()
    while frame is not None and len(callers) < 4:  # pydoc asks by way of inspect
        callers.append(frame.f_globals.get("__name__"))
        frame = frame.f_back
    return [] if "pydoc" in callers else list(__all__)


register_layer()
del register_layer
