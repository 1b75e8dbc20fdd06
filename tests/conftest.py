"""One process per backend: Keras fixes its backend at import, so the environment names it."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for a GPU run on a processor
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere

import keras
import pytest
from hypothesis import settings

# A shell ignores Ctrl-C for what it starts in the background; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Names only: the test_random_*.py say how many examples; all others run as ever.
settings.register_profile("random", print_blob=True)
settings.register_profile("fuzz", print_blob=True)  # tests/fuzz


@pytest.fixture
def where_keras_computes() -> Iterator[None]:
    """PyTorch's functions make tensors where Keras does: on a GPU, where there is one."""
    with contextlib.ExitStack() as stack:
        if keras.config.backend() == "torch":
            torch = pytest.importorskip("torch")
            if torch.cuda.is_available():
                stack.enter_context(torch.device("cuda"))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    keras.utils.set_random_seed(1234)
