"""One process per backend: Keras fixes its backend at import, so the environment names it."""

import os
import signal

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import pytest

# A shell ignores Ctrl-C for what it starts in the background; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    keras.utils.set_random_seed(1234)
