"""Shards → Ray actors, or one after the other in process when there are no workers.

What is done to a shard does not know where it runs: a `Job` is opened once per worker and called
once per shard. Scheduling, restarts and retries are Ray's; finished shards lie on disk, so nothing
but their numbers goes through Ray. Ray is imported only when there are workers.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import psutil
import torch

from kava_core.errors import KavaError
from kava_core.lock import is_alive

RAY_FOLDER = "kava-ray-"
# Ray's sockets lie in it, and a socket's path may have 107 bytes.
LONGEST_ROOT = 30
ENDING_SECONDS = 5

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
    gpus_per_worker: float = 0,
) -> Iterator[tuple[int, Result]]:
    """Run `job` on every shard and yield (shard, result) as they finish, in any order.

    workers: None shares the cores (and GPUs) there are, as many as fit; 0 works in process.
    There are never more workers than fit: one that waits for room would keep its shard waiting.
    Each worker may die and be restarted by Ray three times; a shard is a retry's unit. KavaErrors
    of a worker arrive as they are.
    """
    if not shards:
        return
    if workers == 0:
        yield from _in_process(job, shards)
    else:
        yield from _on_ray(job, shards, workers, cpus_per_worker, gpus_per_worker)


def _in_process(job: Job[Result], shards: Sequence[int]) -> Iterator[tuple[int, Result]]:
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        work = job.open()
        for shard in shards:
            yield shard, work(shard)
    finally:
        torch.set_num_threads(before)


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
    job: Job[Result], shards: Sequence[int], workers: int | None, cpus: float, gpus: float
) -> Iterator[tuple[int, Result]]:
    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    with ray_running(job.threads, "set resources.workers to 0"):
        places = room(cpus, gpus)
        actor = ray.remote(_Worker).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=3, max_task_retries=3
        )
        count = min(workers or places, places, len(shards))
        pool = ActorPool([actor.remote(job) for _ in range(count)])
        results = pool.map_unordered(lambda a, s: a.run.remote(s), list(shards))
        try:
            for shard, result, error in results:
                if error is not None or result is None:
                    raise KavaError(error or f"shard {shard} came back empty")
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
    what a person can do who has no Ray. KavaError if it cannot be started.
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
                with _keeping_sigterm():
                    ray.init(
                        address=address,
                        include_dashboard=False,
                        configure_logging=False,
                        log_to_driver=False,
                        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
                        _temp_dir=folder,
                    )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise KavaError(
                    f"Ray could not be started or reached: {error}. Check RAY_ADDRESS, or "
                    f"{otherwise}."
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
