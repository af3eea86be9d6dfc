"""Ray itself: started here for as long as it is needed, or the cluster of RAY_ADDRESS, and what
room there is on it. Imported only when there are workers or several processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from kava_core.errors import KavaError
from kava_core.lock import is_alive
from kava_core.parallel.devices import NO_GPU

if TYPE_CHECKING:
    import grpc

RAY_FOLDER = "kava-ray-"
CACHE = ("KAVA_CACHE", "KAVA_CACHE_SIZE")  # of stores, whose room this one knows nothing of
# Ray's sockets lie in it, and a socket's path may have 107 bytes.
LONGEST_ROOT = 30
ENDING_SECONDS = 5
ANSWER_SECONDS = 10.0  # that a cluster has to answer a first call
# What only the head of a cluster is asked, and the server of its clients.
HEAD_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
CLIENT_CALL = "/ray.rpc.RayletDriver/ClusterInfo"
FOREIGN = "wants a token"
TLS_FILES = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT")


@contextmanager
def ray_running(otherwise: str) -> Iterator[None]:
    """Ray, for as long as it is needed; one that runs already stays as it is.

    RAY_ADDRESS, if set, names a cluster; otherwise Ray starts here and ends with us. otherwise:
    what a person can do who has no Ray. KavaError if it cannot be started, or if no cluster answers
    within `ANSWER_SECONDS`.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    before = _children()
    with _own_folder() if address == "local" else nullcontext() as folder:
        try:
            try:
                if address != "local":
                    _check_answers(address, otherwise)
                with _keeping_sigterm():
                    ray.init(
                        address=address,
                        include_dashboard=False,
                        configure_logging=False,
                        log_to_driver=False,
                        _temp_dir=folder,
                    )
            except KavaError:
                raise
            except Exception as error:  # a node that takes too long to start is a bare Exception
                said = str(error).partition("\n")[0]
                raise KavaError(
                    f"Ray could not be started or reached: {said} Check RAY_ADDRESS, and that the "
                    f"machine is not overloaded, or {otherwise}."
                ) from None
            yield
        finally:
            # Those of a parent that has ended are nobody's. Of a cluster none are ours.
            started = _children() - before if address == "local" else set()
            ray.shutdown()
            _end(started)


@contextmanager
def _own_folder() -> Iterator[str]:
    """A folder for what Ray writes, gone afterwards; those of runs that were killed go too."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > LONGEST_ROOT:
        root = Path("/tmp")
    for left in root.glob(f"{RAY_FOLDER}*"):
        pid = left.name.removeprefix(RAY_FOLDER).partition("-")[0]
        if pid.isdigit() and not is_alive(int(pid)) and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{RAY_FOLDER}{os.getpid()}-", dir=root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end(processes: set[psutil.Process]) -> None:
    """Wait for them, and kill those that stay: Ray's agents notice its end late, or never."""
    _, alive = psutil.wait_procs(processes, timeout=ENDING_SECONDS)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=ENDING_SECONDS)


def _children() -> set[psutil.Process]:
    """What this process has started, and what that has."""
    return set(psutil.Process().children(recursive=True))


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Ray puts a handler of its own, which ends with another status than a shell expects."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_answers(address: str, otherwise: str) -> None:
    """KavaError unless a cluster answers at RAY_ADDRESS; Ray itself would ask for minutes.

    Of an address of another form than host:port, Ray knows more.
    """
    place = _recorded() if address == "auto" else address
    parts = urlsplit(place if "://" in place else f"//{place}")
    if parts.port is None:
        return
    why = _silence(parts.netloc, CLIENT_CALL if parts.scheme == "ray" else HEAD_CALL)
    if why == FOREIGN:
        raise KavaError(
            f"the Ray cluster at RAY_ADDRESS {address} takes those only who have its token. Set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its "
            f"head, or {otherwise}."
        )
    if why:
        recorded = f" (the last cluster that was started here had {place})"
        raise KavaError(
            f"expected a Ray cluster at RAY_ADDRESS {address}, and {why}"
            f"{recorded if address == 'auto' else ''}. Correct it or start the cluster (`ray start "
            f"--head`), unset it to compute here, or {otherwise}."
        )


def _recorded() -> str:
    """Where `ray start` on this machine left the address of the last cluster, for `auto`."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8").strip()
    return ""


def _silence(place: str, call: str) -> str:
    """Why what listens at host:port is no cluster; nothing if it is."""
    import grpc

    with _channel(place) as channel:
        ask = channel.unary_unary(call)
        try:
            ask(b"", timeout=ANSWER_SECONDS, wait_for_ready=True, metadata=_token())
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                return FOREIGN
            if code == grpc.StatusCode.UNIMPLEMENTED:
                return "what answered is no Ray of that kind"
            if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                return f"none answered within {ANSWER_SECONDS:g} s"
    return ""


def _token() -> list[tuple[str, str]]:
    """The token that Ray would show, from where it takes it."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return []
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        default = Path.home() / ".ray" / "auth_token"
        with suppress(OSError, UnicodeDecodeError):
            file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", default))
            token = file.read_text(encoding="utf-8")
    return [("authorization", f"Bearer {token.strip()}")] if token else []


def _channel(place: str) -> grpc.Channel:
    import grpc

    direct = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0") == "0":
        return grpc.insecure_channel(place, direct)
    try:
        files = [Path(os.environ[name]).read_bytes() for name in TLS_FILES]
    except (KeyError, OSError) as error:
        raise KavaError(
            f"RAY_USE_TLS is set, and a file of {', '.join(TLS_FILES)} cannot be read ({error}). "
            "Set all three to files of this machine, or unset RAY_USE_TLS."
        ) from None
    return grpc.secure_channel(place, grpc.ssl_channel_credentials(*files), direct)


def grows() -> bool:
    """Whether nodes may come: to a cluster they do, and an autoscaler starts those asked for."""
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def visible_gpus() -> float:
    """How many GPUs Ray knows of."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


def places(cpus: float, gpus: float) -> int:
    """How many workers fit on the nodes there are, if they do nothing else."""
    import ray

    shares = {name: share for name, share in (("CPU", cpus), ("GPU", gpus)) if share}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(has.get(k, 0) // v) for k, v in shares.items()) for has in machines)


def described() -> str:
    """`4 CPUs and 0 GPUs on 2 machines`."""
    import ray

    has = ray.cluster_resources()
    machines = sum(node["Alive"] for node in ray.nodes())
    cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {machines} machine{'s' if machines > 1 else ''}"


def worker_environment(threads: int, gpus: float) -> dict[str, str]:
    """Of a process with so many threads; without a share of a GPU it is shown none. Stores are
    cached as they are here; credentials stay here, since Ray shows what it passes on.

    Not the job's: within `ray job submit` that is the submitter's.
    """
    cache = {name: os.environ[name] for name in CACHE if os.environ.get(name)}
    if (folder := CACHE[0]) in cache:
        cache[folder] = str(Path(cache[folder]).absolute())
    return {
        **cache,
        "OMP_NUM_THREADS": str(threads),
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's own keeps what it decoded, some 50 MB
        **({} if gpus else NO_GPU),
    }
