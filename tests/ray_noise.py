"""What Ray warns of by itself, and what JAX warns of where Ray forks to start a process."""

import pytest

ray_noise = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:os.fork:RuntimeWarning",
)
