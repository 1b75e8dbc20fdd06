"""Two processes that collect together get what one process gets alone."""

from __future__ import annotations

from pathlib import Path

import collecting_process as processes
import keras
import numpy as np
import pytest
import two_processes

import truenorm as tn

pytestmark = pytest.mark.costly

WORKER = Path(__file__).parents[1] / "collecting_process.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes have written."""
    return two_processes.run(WORKER, tmp_path_factory.mktemp("processes"))


def close(a: tn.Population, b: tn.Population, tolerance: float) -> None:
    assert (a.samples, a.batches) == (b.samples, b.batches)
    for path, moments in a.sites.items():
        other = b.sites[path]
        np.testing.assert_array_equal(moments.count, other.count)
        shift = (moments.mean - other.mean) / other.standard_deviation
        np.testing.assert_allclose(shift, 0, atol=tolerance)
        np.testing.assert_allclose(moments.variance, other.variance, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # A pass is the same computation; settled statistics are settled to 2e-6.
    [("shared", 1e-12), ("own part", 1e-12), ("one batch", 1e-12), ("settled", 1e-5)],
)
def test_all_processes_get_what_one_gets_alone(folder: Path, name: str, tolerance: float) -> None:
    model, x = processes.model(), processes.data()
    x = x[:8] if name == "one batch" else x
    upstream = "population" if name == "settled" else "batch"
    alone = tn.collect(model, x, batch_size=8, upstream=upstream)
    first, second = (tn.Population.load(folder / f"{name} {rank}.npz") for rank in range(2))
    assert first.to_dict() == second.to_dict()  # the same bits in both
    close(first, alone, tolerance)
    for path, error in alone.standard_errors().items():
        assert first.standard_errors()[path] == pytest.approx(error, rel=1e-4)


@pytest.mark.skipif(
    keras.config.backend() == "tensorflow", reason="test_layer_workers has it of TensorFlow"
)
def test_a_process_that_dies_is_an_error_of_truenorm_s_in_the_other() -> None:
    with two_processes.started(WORKER.with_name("lost_collector.py"), "") as (first, _):
        said = first.communicate(timeout=180)[0]
    assert "DistributedError: Another process did not take part in the exchange" in said, said
    remedy = {"torch": "timeout= of torch.distributed", "jax": "heartbeat_timeout_seconds= of jax"}
    assert remedy[keras.config.backend()] in said


def test_a_process_that_fails_does_not_leave_the_other_waiting(folder: Path) -> None:
    said = [(folder / f"failure {rank}.txt").read_text("utf-8") for rank in range(2)]
    assert said[0].startswith("Another process that collects statistics with this one has failed.")
    assert said[1].startswith("The data does not fit the model's inputs (at 'data').")
