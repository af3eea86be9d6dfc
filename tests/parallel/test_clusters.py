"""The cluster that RAY_ADDRESS names: used where it answers, an error at once where nobody does."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from kava_core.errors import KavaError
from kava_core.parallel import cluster as rays
from kava_core.parallel.cluster import ANSWER_SECONDS, ray_running
from kava_core.store import cache


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


def test_the_address_of_a_cluster_that_has_ended_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where `auto` looks."""
    monkeypatch.setattr(rays, "ANSWER_SECONDS", 1.0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        said = (
            rf"RAY_ADDRESS auto, and none answered within 1 s \(the last cluster .* had {address}"
        )
        with pytest.raises(KavaError, match=said), ray_running("do without"):
            pass


class Asks(grpc.GenericRpcHandler):
    """A server that lets nobody in but those with the token, if it has one, and knows no call."""

    def __init__(self, token: str) -> None:
        self.token = token

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        shown = dict(call.invocation_metadata).get("authorization", "")
        if not self.token or shown == f"Bearer {self.token}":
            return None

        def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
            return b""

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "what answered is no Ray of that kind"),
        ("theirs", "takes those only who have its token.*RAY_AUTH_TOKEN"),
        ("mine", "what answered is no Ray of that kind"),
    ],
)
def test_what_is_no_cluster_or_not_ours_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, token: str, said: str, form: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    server = grpc.server(ThreadPoolExecutor(1), [Asks(token)])
    address = form.format(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    try:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(KavaError, match=f"RAY_ADDRESS {address}.*{said}.*or do without"):
            rays._check_answers(address, "do without")
    finally:
        server.stop(None)


def test_tls_without_its_files_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.delenv("RAY_TLS_CA_CERT", raising=False)
    with pytest.raises(KavaError, match=r"RAY_USE_TLS is set.*RAY_TLS_CA_CERT"):
        rays._check_answers("127.0.0.1:1", "do without")


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


def test_workers_have_the_cache_of_the_driver_and_none_of_its_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert rays.CACHE == (cache.FOLDER, cache.SIZE)
    for name in rays.CACHE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    plain = rays.worker_environment(2, 1)
    assert plain.keys() == {"OMP_NUM_THREADS", "ARROW_DEFAULT_MEMORY_POOL"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAVA_CACHE", "copies")
    monkeypatch.setenv("KAVA_CACHE_SIZE", "7GB")
    added = {"KAVA_CACHE": str(tmp_path / "copies"), "KAVA_CACHE_SIZE": "7GB"}
    assert rays.worker_environment(2, 1) == {**plain, **added}
