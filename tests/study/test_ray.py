"""Trials on a Ray cluster: two nodes on this machine, one of them killed half-way."""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from ray_noise import ray_noise
from test_study import arrays, build

import truenorm as tn
from truenorm._study.experiment import study
from truenorm._study.pool import Progress
from truenorm._study.ray_tasks import connected

pytestmark = ray_noise
POSITIONS = ("before_activation", "after_activation")


def unused_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_an_address_where_nothing_answers(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for address in (f"127.0.0.1:{unused_port()}", "ray://no-port", "127.0.0.1:99999999"):
        with pytest.raises(tn.StudyError, match=r"^There is no Ray cluster at this address"):
            study(
                build,
                arrays(),
                positions=POSITIONS,
                seeds=1,
                epochs=1,
                directory=tmp_path,
                runner=address,
            )


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(tn.MissingDependencyError, match=r"^Ray is not installed\. Remedy: pip"):
        connected("ray")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Generator[Any]:
    """A head without room for tasks, and two nodes with room for one each.

    It listens on loopback only, and leaves other clusters of this machine alone: it has a folder
    and a port of its own, and is not announced as the machine's one.
    """
    pytest.importorskip("ray", reason="an extra of its own: pip install 'truenorm[ray]'")
    from ray.cluster_utils import Cluster

    # Else Ray puts the machine's own address in the place of a local one.
    monkeypatch.setattr("ray._private.services.get_node_ip_address", lambda *_, **__: "127.0.0.1")
    monkeypatch.setattr("ray._private.utils.write_ray_address", lambda *_: None)
    monkeypatch.setattr("ray._common.utils.reset_ray_address", lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        own = {"node_ip_address": "127.0.0.1", "temp_dir": folder}
        made = Cluster(
            initialize_head=True,
            head_node_args={
                **own,
                "num_cpus": 0,
                "include_dashboard": False,
                "gcs_server_port": unused_port(),
            },
        )
        made.nodes = [  # pyright: ignore[reportAttributeAccessIssue]
            made.add_node(num_cpus=1, **own) for _ in range(2)
        ]
        try:
            yield made
        finally:
            made.shutdown()


@pytest.mark.long
def test_every_trial_ends_once_though_a_node_is_killed(cluster: Any, tmp_path: Path) -> None:
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    events: list[Progress] = []
    killing: list[threading.Thread] = []

    def watch(event: Progress) -> None:
        events.append(event)
        if event.kind == "epoch" and not killing:
            killing.append(
                threading.Thread(target=cluster.remove_node, args=(cluster.nodes[0], False))
            )
            killing[0].start()

    try:
        result = study(
            build,
            arrays(),
            positions=POSITIONS,
            seeds=2,
            epochs=3,
            batch_size=16,
            directory=tmp_path,
            runner="ray",
            on_event=watch,
        )
    finally:
        for thread in killing:
            thread.join()
        ray.shutdown()
    ends = Counter((e.position, e.seed) for e in events if e.kind in ("finished", "failed"))
    assert ends == Counter({(p, s): 1 for p in POSITIONS for s in (0, 1)})
    assert killing
    assert [t.error for t in result.trials] == [None] * 4
    assert all((tmp_path / t.model).is_file() for t in result.trials)
    local = study(
        build,
        arrays(),
        positions=POSITIONS,
        seeds=2,
        epochs=3,
        batch_size=16,
        runner="here",
    )
    for one, other in zip(result.trials, local.trials, strict=True):
        assert one.start == other.start
        assert one.history["val_loss"] == pytest.approx(other.history["val_loss"], rel=1e-3)
