"""A training, run in this process or in several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kava_core.distill.callbacks import STOP_FILE, following
from kava_core.parallel.processes import count_processes, run_processes
from kava_core.settings import Resources, Training
from kava_core.settings.base import Processes


class TrainingJob(Protocol):
    """What each process of a training runs; it can be pickled. It works in the folder `work`."""

    @property
    def work(self) -> Path: ...

    @property
    def curves(self) -> Path:
        """The folder of its loss curves."""
        ...

    @property
    def checkpoints(self) -> Path: ...

    def __call__(self) -> None: ...


def run_training(
    job: TrainingJob,
    title: str,
    training: Training,
    processes: Processes,
    resources: Resources,
    *,
    steps: Callable[[], int],
) -> None:
    """Run `job` to its end, in as many processes as the settings say.

    title: of the progress bar. steps: gives its length, those that the training takes.
    KavaErrors are those of the job, of `count_processes` and of `run_processes`.
    """
    device, gpus = resources.device, resources.gpus_per_worker
    count = count_processes(processes, training.batch_size, device=device, gpus=gpus)
    if not count:
        job()
        return
    with following(job.curves, title, steps()):
        run_processes(
            job,
            count,
            folder=job.work / "ray",
            stop_file=job.checkpoints / STOP_FILE,
            threads=training.threads,
            cpus=resources.cpus_per_worker,
            device=device,
            gpus=gpus,
            patience=resources.wait_for_room,
        )
