"""Does the installed truenorm work? ``KERAS_BACKEND=jax python tools/try_wheel.py``, in any folder.

The compiled passes are loaded where the system has them, unless ``TRUENORM_NATIVE=0`` says that
they are not wanted; a network learns, its statistics are made true, and it folds.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path


def main() -> None:
    """Try it, and say what was tried."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    warnings.simplefilter("error", RuntimeWarning)  # "truenorm runs without its compiled passes"
    import keras
    import numpy as np

    import truenorm as tn

    library = importlib.import_module("truenorm._kernels.library")
    compiled = library.loaded() is not None
    wanted = sys.platform != "win32" and os.environ.get("TRUENORM_NATIVE") != "0"
    if compiled != wanted:
        sys.exit("The compiled passes are not in this wheel.")
    x = np.random.default_rng(0).normal(3, 2, (512, 4)).astype("float32")
    y = (x.sum(axis=1) > 12).astype("int32")
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(16, use_bias=False), tn.BatchNormalization(),
        keras.layers.ReLU(), keras.layers.Dense(2, activation="softmax"),
    ])  # fmt: skip
    model.compile(
        keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(x, y, epochs=5, verbose=0)
    tn.recalibrate(model, x)
    folded = tn.fold(model).model
    folded.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    accuracy = folded.evaluate(x, y, verbose=0)[1]
    if accuracy < 0.9:
        sys.exit(f"It has not learned: accuracy {accuracy:.3f}.")
    print(
        f"truenorm {tn.__version__} in {Path(tn.__file__).parent}, Keras {keras.__version__} on "
        f"{keras.config.backend()}, compiled passes: {compiled}, accuracy {accuracy:.3f}."
    )


if __name__ == "__main__":
    main()
