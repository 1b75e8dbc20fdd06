"""Imports each of the modules named in a process where nothing of Keras nor truenorm is imported.

The processes are copies of this one, which has the backend already: that is most of the time. Ends
with the number of modules that could not be imported.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback

BACKENDS = {"torch": ["torch", "torch._dynamo"], "jax": ["jax"], "tensorflow": ["numpy"]}


def fails(name: str) -> bool:
    process = os.fork()
    if process == 0:
        try:
            importlib.import_module(name)
            layer = "truenorm>BatchNormalization"
            assert "keras" not in sys.modules or registered(layer), f"{layer} is not registered"
        except BaseException:
            print(f"{name}:", file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1] != 0


def registered(name: str) -> bool:
    import keras

    return keras.saving.get_registered_object(name) is not None


if __name__ == "__main__":
    backend = os.environ["KERAS_BACKEND"]
    if backend == "torch":
        sys.modules["tensorflow"] = None  # type: ignore[assignment]  # It imports Keras.
    for module in BACKENDS[backend]:
        importlib.import_module(module)
    assert "keras" not in sys.modules
    sys.exit(sum(map(fails, sys.argv[1:])))
