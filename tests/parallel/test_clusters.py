"""The cluster that RAY_ADDRESS names: used where it answers, an error at once where nobody does."""

from __future__ import annotations

import socket
import time

import pytest

from kava_core.errors import KavaError
from kava_core.parallel import cluster as rays
from kava_core.parallel.cluster import ANSWER_SECONDS, ray_running


@pytest.mark.parametrize("listening", [False, True])
def test_an_address_that_answers_nobody_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, listening: bool
) -> None:
    """Nothing is there, or something that takes calls and says nothing."""
    assert ANSWER_SECONDS <= 10
    monkeypatch.setattr(rays, "ANSWER_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        began = time.monotonic()
        said = rf"RAY_ADDRESS {address}, and none answered within 1 s.*ray start.*or do without"
        with pytest.raises(KavaError, match=said), ray_running("do without"):
            pass
        assert time.monotonic() - began < 10


def test_an_address_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:port")
    with pytest.raises(KavaError, match="Check RAY_ADDRESS"), ray_running("do without"):
        pass


def test_a_cluster_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 3})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with ray_running("do without"):
            assert rays.visible_gpus() == 3
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()
