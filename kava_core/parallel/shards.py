"""Shards → workers, or one after the other in process when there are none.

What is done to a shard does not know where it runs: a `Job` is opened once per worker and called
once per shard. Workers are Ray's (`kava_core.parallel.workers`); finished shards lie on disk, so
nothing but their numbers goes through Ray, which is imported only when there are workers.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from kava_core.parallel.devices import check_own_gpu, gpu_share
from kava_core.parallel.overlap import Computed, Overlap
from kava_core.parallel.threads import torch_threads
from kava_core.settings import Resources
from kava_core.settings.base import Device

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Job(Protocol[Result_co]):
    """A picklable description of the work; `threads` is the number of torch threads per worker."""

    @property
    def threads(self) -> int: ...

    def open(self) -> Callable[[int], Result_co | Computed[Result_co]]:
        """Load what the worker needs once; the result works on one shard and says what it did, or
        gives what is left to do, which is done while the next one is worked on.

        What it says is small: results go through Ray, work does not.
        """
        ...


def run_shards(
    job: Job[Result],
    shards: Sequence[int],
    resources: Resources,
    *,
    folder: Path,
    examples: Callable[[int, Result], int],
    then: Callable[[int], Sequence[int]] = lambda _: (),
) -> Iterator[tuple[int, Result]]:
    """Run `job` on every shard and yield (shard, result) as they finish, in any order.

    resources: who works. A worker sees the GPU that it has a share of and no other, at `device:
    cpu` none. folder: where results lie, which every worker must see. examples: how many are in a
    shard, by its result, for the log. then: the shards that can be worked on now that one is done;
    they come before those that wait.

    A worker that dies is replaced, and its shard is worked on once more, three times. KavaErrors of
    a worker arrive as they are; others name a node that does not see the folder or has other
    software, and say for how long no worker had room.
    """
    if not shards:
        return
    queue, workers = deque(shards), resources.workers
    cpus = max(resources.cpus_per_worker, job.threads)
    if workers is None and not resources.ray_metrics and _fits_once(cpus, resources.device):
        workers = 0
    if workers == 0:
        check_own_gpu(resources.device, resources.gpus_per_worker)
        yield from _in_process(job, queue, then)
        return
    from kava_core.parallel.cluster import ray_running, visible_gpus
    from kava_core.parallel.meter import Meter
    from kava_core.parallel.workers import Demand, Pool

    with ray_running("set resources.workers to 0"):
        demand = Demand(
            workers,
            job.threads,
            resources.cpus_per_worker,
            gpu_share(resources.device, resources.gpus_per_worker, visible_gpus()),
            resources.wait_for_room,
        )
        meter = Meter(resources.ray_metrics)
        yield from Pool(job, queue, demand, folder, then, examples, meter).results()


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
    with torch_threads(job.threads), closing(Overlap(job.open())) as work:
        while queue:
            for done in work.run(queue.popleft()):
                queue.extendleft(reversed(then(done.shard)))
                yield done.shard, done.result
        for done in work.rest():
            yield done.shard, done.result
