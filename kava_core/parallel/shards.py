"""Shards → Ray actors, or one after the other in process when there are no workers.

What is done to a shard does not know where it runs: a `Job` is opened once per worker and called
once per shard. Scheduling, restarts and retries are Ray's; finished shards lie on disk, so nothing
but their numbers goes through Ray. Ray is imported only when there are workers.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import psutil
import torch

from kava_core.errors import KavaError
from kava_core.lock import is_alive
from kava_core.parallel.devices import NO_GPU, check_own_gpu, gpu_share
from kava_core.parallel.threads import torch_threads
from kava_core.settings.base import Device

RAY_FOLDER = "kava-ray-"
# Ray's sockets lie in it, and a socket's path may have 107 bytes.
LONGEST_ROOT = 30
ENDING_SECONDS = 5
ANSWER_SECONDS = 10.0  # that a cluster has to answer a first call

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Job(Protocol[Result_co]):
    """A picklable description of the work; `threads` is the number of torch threads per worker."""

    @property
    def threads(self) -> int: ...

    def open(self) -> Callable[[int], Result_co]:
        """Load what the worker needs once; the result works on one shard and says what it did.

        What it returns is small: results go through Ray, work does not.
        """
        ...


def run_shards(
    job: Job[Result],
    shards: Sequence[int],
    *,
    workers: int | None,
    cpus_per_worker: float = 1,
    gpus_per_worker: float | None = None,
    device: Device = "auto",
    then: Callable[[int], Sequence[int]] = lambda _: (),
) -> Iterator[tuple[int, Result]]:
    """Run `job` on every shard and yield (shard, result) as they finish, in any order.

    workers: None shares the cores (and GPUs) there are, as many as fit with all their threads; 0
    works in process, and so does None where one worker would have this machine to itself.
    There are never more workers than fit: one that waits for room would keep its shard waiting.
    gpus_per_worker, device: see `gpu_share`; a worker sees the GPU that it has a share of and no
    other, at `device: cpu` none. Each worker may die and be restarted by Ray three times; a shard
    is a retry's unit. KavaErrors of a worker arrive as they are.
    then: the shards that can be worked on now that one is done; they come before those that wait.
    """
    if not shards:
        return
    queue = deque(shards)
    if workers is None and _fits_once(max(cpus_per_worker, job.threads), device):
        workers = 0
    if workers == 0:
        check_own_gpu(device, gpus_per_worker)
        yield from _in_process(job, queue, then)
    else:
        yield from _on_ray(job, queue, then, workers, cpus_per_worker, gpus_per_worker, device)


def _fits_once(cpus: float, device: Device) -> bool:
    """Whether this machine alone computes, and has room for one worker and no second one."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    alone = "RAY_ADDRESS" not in os.environ and gpus <= 1
    if "ray" in sys.modules:  # a caller's, of any size
        alone = alone and not sys.modules["ray"].is_initialized()
    return alone and int((os.cpu_count() or 1) // cpus) == 1


def _in_process(
    job: Job[Result], queue: deque[int], then: Callable[[int], Sequence[int]]
) -> Iterator[tuple[int, Result]]:
    with torch_threads(job.threads):
        work = job.open()
        while queue:
            shard = queue.popleft()
            result = work(shard)
            queue.extendleft(reversed(then(shard)))
            yield shard, result


class _Worker(Generic[Result]):
    """The actor. Errors a person can mend travel as values, since Ray wraps exceptions."""

    def __init__(self, job: Job[Result]) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        self.work: Callable[[int], Result] | None = None

    def run(self, shard: int) -> tuple[int, Result | None, str | None]:
        try:
            self.work = self.work or self.job.open()
            return shard, self.work(shard), None
        except KavaError as error:
            return shard, None, str(error)


def _on_ray(
    job: Job[Result],
    queue: deque[int],
    then: Callable[[int], Sequence[int]],
    workers: int | None,
    cpus: float,
    asked: float | None,
    device: Device,
) -> Iterator[tuple[int, Result]]:
    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    with ray_running(job.threads, "set resources.workers to 0"):
        gpus = gpu_share(device, asked, visible_gpus())
        places = room(cpus, gpus)
        # By default all threads of all workers have a core; who asks for more workers gets them.
        own = max(1, int(ray.cluster_resources().get("CPU", 0) // max(cpus, job.threads)))
        actor = ray.remote(_Worker).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=3,
            max_task_retries=3,
            runtime_env={} if gpus else {"env_vars": NO_GPU},
        )
        count = min(workers or own, places, len(queue))
        pool = ActorPool([actor.remote(job) for _ in range(count)])

        def fill() -> None:
            while queue and pool.has_free():
                pool.submit(lambda a, s: a.run.remote(s), queue.popleft())

        try:
            fill()
            while pool.has_next():
                shard, result, error = pool.get_next_unordered()
                if error is not None or result is None:
                    raise KavaError(error or f"shard {shard} came back empty")
                queue.extendleft(reversed(then(shard)))
                fill()  # before the caller looks at the result, so that no worker waits for that
                yield shard, result
        except RayError as error:
            raise KavaError(
                f"a worker failed and Ray's retries did not help: {error}. Finished shards are "
                "kept; run the stage again to go on, or with resources.workers: 0 to see the error "
                "itself."
            ) from error


@contextmanager
def ray_running(threads: int, otherwise: str) -> Iterator[None]:
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
                if not _answers(address):
                    raise KavaError(
                        f"expected a Ray cluster at RAY_ADDRESS {address}, and none answered "
                        f"within {ANSWER_SECONDS:g} s. Correct it or start the cluster (`ray start "
                        f"--head`), unset it to compute here, or {otherwise}."
                    )
                with _keeping_sigterm():
                    ray.init(
                        address=address,
                        include_dashboard=False,
                        configure_logging=False,
                        log_to_driver=False,
                        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
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
            started = _children() - before  # those of a parent that has ended are nobody's
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


def _answers(address: str) -> bool:
    """Whether a gRPC server, as every head of a cluster is, answers at an address host:port. Ray
    itself would ask for minutes. Of an address of another form, or under TLS, Ray knows more."""
    import grpc

    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.port is None or os.environ.get("RAY_USE_TLS", "0") != "0":
        return True
    with grpc.insecure_channel(parts.netloc, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            return False
    return True


def visible_gpus() -> float:
    """How many GPUs Ray knows of."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


def room(cpus: float, gpus: float) -> int:
    """How many workers fit; KavaError if none does, since it would be waited for for ever."""
    import ray

    shares = {"CPU": cpus, "GPU": gpus}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(has.get(k, 0) // v) for k, v in shares.items() if v) for has in machines)
    if not room:
        has = ray.cluster_resources()
        raise KavaError(
            f"expected a machine with room for a worker of {cpus:g} CPUs and {gpus:g} GPUs, found "
            f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs on {len(machines)}. Lower "
            "resources.cpus_per_worker or resources.gpus_per_worker."
        )
    return room
