"""One training over several processes: Ray Train starts them, here or on the cluster of
RAY_ADDRESS, and joins them in a torch process group; `kava_core.parallel.group` speaks for it.

Every process runs the same job and works on its part of each batch. Checkpoints, data and results
lie on a disk that all of them see. Ray is imported only when there are several.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kava_core.console import console, say
from kava_core.errors import KavaError
from kava_core.parallel import group
from kava_core.parallel.devices import NO_GPU, check_own_gpu, gpu_share
from kava_core.parallel.shards import ray_running, room, visible_gpus
from kava_core.settings.base import Device, Processes

FOLLOW_SECONDS = 0.5
ALONE = "set `processes` to 1"


def count_processes(
    asked: Processes, batch_size: int, *, device: Device, gpus: float | None, threads: int
) -> int:
    """How many processes to start for a training; 0: none, this one does it.

    asked: 1 is this one; `auto` as many as there are GPUs, here or in the cluster of RAY_ADDRESS,
    of which `batch_size` is a multiple; without GPUs, or with one here, this one. device, gpus: as
    in `gpu_share`, whose KavaErrors are those of this process where it trains. threads: those of a
    process, for a Ray that is started.
    """
    if asked == "auto":
        there = _gpus(device, threads)
        found = max((n for n in range(1, there + 1) if batch_size % n == 0), default=1)
        if found < there:
            say(f"{found} of {there} GPUs train: batch_size {batch_size} is shared evenly")
        if there and not torch.cuda.device_count():
            return found
    else:
        found = asked
    if found > 1:
        return found
    check_own_gpu(device, gpus)
    return 0


def _gpus(device: Device, threads: int) -> int:
    if device == "cpu":
        return 0
    if "RAY_ADDRESS" not in os.environ:
        return torch.cuda.device_count()
    with ray_running(threads, ALONE):
        return int(visible_gpus())


def run_processes(
    job: Callable[[], None],
    processes: int,
    *,
    folder: Path,
    stop_file: Path,
    threads: int,
    cpus: float,
    device: Device,
    gpus: float | None,
) -> None:
    """Run `job`, which can be pickled, in `processes` processes at once, until all are done.

    folder: for Ray's own notes, on the shared disk. stop_file: made when SIGTERM arrives here; the
    job watches for it. cpus: reserved for each process. device, gpus: as in `gpu_share`; who gets a
    share gets a whole GPU, since processes that talk through NCCL cannot have the same one.

    KavaErrors of the job arrive as they are. A process that dies ends all the others; what they
    saved is kept, and the same call goes on from there.
    """
    with ray_running(threads, ALONE):
        from ray.exceptions import RayError
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        each = math.ceil(gpu_share(device, gpus, visible_gpus()))
        places = room(cpus, each)
        if places < processes:
            raise KavaError(
                f"expected room for {processes} processes of {cpus:g} CPUs and {each} GPUs, "
                f"found room for {places}. Lower `processes` or resources.cpus_per_worker"
                + (", or set resources.device to cpu." if each else ".")
            )
        folder.mkdir(parents=True, exist_ok=True)
        said = folder / "said.txt"
        said.unlink(missing_ok=True)
        interrupt = signal.getsignal(signal.SIGINT)  # Ray Train puts its own and leaves it
        trainer = TorchTrainer(
            lambda: _run(job, said),
            scaling_config=ScalingConfig(
                num_workers=processes,
                use_gpu=each > 0,
                resources_per_worker={"CPU": cpus, **({"GPU": each} if each else {})},
            ),
            # A process may not come back alone: its group is gone with it.
            run_config=RunConfig(  # type: ignore[call-arg]  # known at run time, of Train V2
                name="train",
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=0),
                worker_runtime_env={} if each else {"env_vars": NO_GPU},
            ),
        )
        try:
            with _passing_on_sigterm(stop_file), _repeating(said):
                trainer.fit()
        except (RayError, TrainingFailedError) as error:
            raise _explained(error) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, interrupt)


def _run(job: Callable[[], None], said: Path) -> None:
    """In a process of the group: the first one's words are passed on, the others keep theirs."""
    if group.rank() > 0:
        console.quiet = True
        job()
        return
    with said.open("a", encoding="utf-8", buffering=1) as file:
        console.file = file
        job()


def _explained(error: Exception) -> Exception:
    """The job's own error if it is one that a person can mend."""
    failures = getattr(error, "worker_failures", {None: error})
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
    for cause in causes.values():
        if isinstance(cause, KavaError):
            return cause
    ranks = ", ".join(str(rank) for rank in sorted(causes) if rank is not None) or "?"
    first = " / ".join(
        f"{type(x).__name__}: {str(x).strip().splitlines()[0]}" for x in causes.values()
    )
    return KavaError(
        f"of the training processes {ranks} failed ({first}). What was saved is kept; run the same "
        "command again to go on, or with `processes: 1` to see the error itself."
    )


@contextmanager
def _passing_on_sigterm(stop_file: Path) -> Iterator[None]:
    """SIGTERM makes the file (main thread only, as signals are)."""
    stop_file.parent.mkdir(parents=True, exist_ok=True)
    stop_file.unlink(missing_ok=True)

    def receive(*_: object) -> None:
        stop_file.touch()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _repeating(said: Path) -> Iterator[None]:
    """Say here what is written to the file, line by line."""
    over = threading.Event()

    def repeat() -> None:
        done = 0
        while True:
            last = over.wait(FOLLOW_SECONDS)
            text = said.read_text(encoding="utf-8") if said.exists() else ""
            end = text.rfind("\n") + 1
            if end > done:
                say(text[done : end - 1])
                done = end
            if last:
                return

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
