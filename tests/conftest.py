"""One process per backend: Keras fixes its backend at import, so the environment names it."""

import contextlib
import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for a GPU run on a processor
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # see _quick_compilation
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere

# Then JAX compiles a program once for all tests, workers, processes that they start, and runs: many
# use the same small models. The folder grows; make clean empties it.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"])
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache/jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import keras
import pytest
from hypothesis import settings

QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
ARITHMETIC = {"kernels", "layer", "statistics"}
"""Folders whose tests are of the numbers themselves."""

if QUICK and keras.config.backend() == "jax":
    from jax._src import compiler

    compiler_options = getattr(compiler, "get_compile_options", None)  # private: may be gone

    def quick_options(*given: Any, **named: Any) -> Any:
        """Where XLA leaves out optimizations, fusions are made the old way: in half the time."""
        assert compiler_options
        options = compiler_options(*given, **named)
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
            options.env_option_overrides += [("xla_cpu_use_fusion_emitters", False)]
        return options

    if compiler_options:
        compiler.get_compile_options = quick_options

# JAX and TensorFlow make so many objects that collecting at each 700 takes a tenth of the time.
gc.set_threshold(10_000)

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


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation(request: pytest.FixtureRequest) -> None:
    """JAX: where arithmetic is not what is tested, XLA leaves out its costly optimizations.

    Almost everything runs once here, so they take more time than they save. Processes that the
    tests start get the same by the environment. `make random` and `make long` compile as users do.
    """
    quick = str(int(QUICK and request.path.parent.name not in ARITHMETIC))
    if keras.config.backend() != "jax" or os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == quick:
        return
    import jax

    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = quick
    jax.config.update("jax_disable_most_optimizations", quick == "1")
    jax.clear_caches()  # what was compiled in the other way
