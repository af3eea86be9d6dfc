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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kava_core.artefacts import ensure_folder
from kava_core.console import console, say
from kava_core.errors import KavaError
from kava_core.parallel import group
from kava_core.parallel.cluster import (
    described,
    grows,
    places,
    ray_running,
    visible_gpus,
    worker_environment,
)
from kava_core.parallel.devices import check_own_gpu, gpu_share
from kava_core.parallel.nodes import SEEN_WITHIN, Common, Host, looker, shared
from kava_core.settings.base import Device, Processes

if TYPE_CHECKING:
    from ray.train import UserCallback

FOLLOW_SECONDS = 0.5
RESTARTS = 3  # of all processes, after one was lost
START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
ALONE = "set `processes` to 1"


def count_processes(
    asked: Processes, batch_size: int, *, device: Device, gpus: float | None
) -> int:
    """How many processes to start for a training; 0: none, this one does it.

    asked: 1 is this one; `auto` as many as there are GPUs, here or in the cluster of RAY_ADDRESS,
    of which `batch_size` is a multiple; without GPUs, or with one here, this one. device, gpus: as
    in `gpu_share`, whose KavaErrors are those of this process where it trains. threads: those of a
    process, for a Ray that is started.
    """
    if asked == "auto":
        there = _gpus(device)
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


def _gpus(device: Device) -> int:
    if device == "cpu":
        return 0
    if "RAY_ADDRESS" not in os.environ:
        return torch.cuda.device_count()
    with ray_running(ALONE):
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
    patience: float,
) -> None:
    """Run `job`, which can be pickled, in `processes` processes at once, until all are done.

    folder: for Ray's own notes, on the shared disk. stop_file: made when SIGTERM arrives here; the
    job watches for it. cpus: reserved for each process. device, gpus: as in `gpu_share`; who gets a
    share gets a whole GPU, since processes that talk through NCCL cannot have the same one.
    patience: seconds that are waited for room where nodes may come.

    KavaErrors of the job arrive as they are. A process that dies, or whose node does, ends all the
    others; all start again, three times, and the job goes on from what it saved. It may not come
    back alone: its group is gone with it.
    """
    with ray_running(ALONE), shared(ensure_folder(folder)) as common:
        from ray.exceptions import RayError
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        each = math.ceil(gpu_share(device, gpus, visible_gpus()))
        _check_room(processes, cpus, each, patience)
        said = folder / "said.txt"
        said.unlink(missing_ok=True)
        interrupt = signal.getsignal(signal.SIGINT)  # Ray Train puts its own and leaves it
        trainer = TorchTrainer(
            lambda: _run(job, said, common),
            scaling_config=ScalingConfig(
                num_workers=processes,
                use_gpu=each > 0,
                resources_per_worker={"CPU": cpus, **({"GPU": each} if each else {})},
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # known at run time, of Train V2
                name="train",
                storage_path=str(folder),
                failure_config=FailureConfig(  # type: ignore[call-arg]
                    max_failures=RESTARTS, controller_failure_limit=RESTARTS
                ),
                callbacks=[_telling(said)],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": worker_environment(threads, each)},
            ),
        )
        try:
            with _passing_on_sigterm(stop_file), _repeating(said), _waiting(patience):
                trainer.fit()
        except (RayError, TrainingFailedError) as error:
            raise _explained(error, processes, patience) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, interrupt)


def _check_room(processes: int, cpus: float, gpus: float, patience: float) -> None:
    """KavaError for more processes than fit where no nodes come; elsewhere what is waited for."""
    there = places(cpus, gpus)
    if there >= processes:
        return
    asked = f"room for {processes} processes of {cpus:g} CPUs and {gpus:g} GPUs"
    if not grows():
        raise KavaError(
            f"expected {asked}, found room for {there}. Lower `processes` or "
            "resources.cpus_per_worker" + (", or set resources.device to cpu." if gpus else ".")
        )
    say(
        f"waiting for {asked}, for at most {patience:g} s (resources.wait_for_room); there are "
        f"{described()}"
    )


@contextmanager
def _waiting(patience: float) -> Iterator[None]:
    """Let Ray Train wait so long for room, in as many pieces as it starts anew."""
    before = os.environ.get(START_SECONDS)
    os.environ[START_SECONDS] = str(patience / (RESTARTS + 1))
    try:
        yield
    finally:
        os.environ.pop(START_SECONDS)
        if before is not None:
            os.environ[START_SECONDS] = before


def _telling(said: Path) -> UserCallback:
    """What the controller of a run does when processes fail: it says so, and a KavaError ends the
    run, which would end alike if it was repeated."""
    from ray.train import UserCallback

    class _Telling(UserCallback):
        failures = 0

        def after_exception(
            self, run_context: object, worker_exceptions: dict[int, Exception]
        ) -> None:
            for error in worker_exceptions.values():
                if isinstance(cause := getattr(error, "_base_exc", error), KavaError):
                    raise cause
            self.failures += 1
            if self.failures <= RESTARTS:
                reason = str(next(iter(worker_exceptions.values()))).strip().partition("\n")[0]
                with said.open("a", encoding="utf-8") as file:
                    file.write(
                        f"training processes {_ranks(worker_exceptions)} were lost ({reason}): all "
                        f"go on from the last checkpoint ({self.failures} of {RESTARTS})\n"
                    )

    return _Telling()


def _run(job: Callable[[], None], said: Path, common: Common) -> None:
    """In a process of the group: the first one's words are passed on, the others keep theirs."""
    common.check(Host(*looker()(str(common.mark), common.token, SEEN_WITHIN)))
    if group.rank() > 0:
        console.quiet = True
        job()
        return
    with said.open("a", encoding="utf-8", buffering=1) as file:
        console.file = file
        job()


def _explained(error: Exception, processes: int, patience: float) -> Exception:
    """The job's own error if it is one that a person can mend."""
    from ray.train.v2.api.exceptions import ControllerError

    if isinstance(error, ControllerError):
        failure = error.controller_failure
        own = getattr(failure, "controller_failure", failure)  # of a callback's, once more
        if isinstance(own, KavaError):
            return own
        if "Timeout" in type(own).__name__:
            return KavaError(
                f"expected room for {processes} training processes within {patience:g} s, found "
                f"{described()}. Lower `processes`, start nodes with more, or raise "
                "resources.wait_for_room; what was saved is kept, and the same command goes on."
            )
        error = own
    failures = getattr(error, "worker_failures", None) or {-1: error}
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
    first = " / ".join(
        f"{type(x).__name__}: {str(x).strip().splitlines()[0]}" for x in causes.values()
    )
    return KavaError(
        f"of the training processes {_ranks(causes)} failed ({first}). What was saved is kept; run "
        "the same command again to go on, or with `processes: 1` to see the error itself."
    )


def _ranks(failures: Mapping[int, Exception]) -> str:
    return ", ".join(str(rank) for rank in sorted(failures) if rank >= 0) or "?"


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
