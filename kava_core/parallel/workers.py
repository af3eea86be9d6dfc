"""Ray actors that work on shards: asked of Ray, taken as they come, replaced when they are lost.

A shard is given to a worker that has shown itself, never to one that waits for room: so nothing
waits for a node that does not come, and one that comes late has work at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from kava_core.console import say, warn
from kava_core.errors import KavaError
from kava_core.parallel import cluster
from kava_core.parallel.meter import Meter
from kava_core.parallel.nodes import SEEN_WITHIN, Common, Host, looker, shared

RETRIES = 3  # of a shard whose worker is lost
LOOK_SECONDS = 1.0  # between looks at what has come and gone
COUNT_SECONDS = 5.0  # between counts of the places there are
SLOW_SECONDS = 30.0  # that a worker takes to start where there is room

Result = TypeVar("Result")


def _worker_class() -> type:
    """The actor. Ray sends this class whole, so that it starts on a node without the package and
    says so. Errors a person can mend travel as values, since Ray wraps exceptions."""
    look = looker()

    class _Worker:
        def look(self, mark: str, token: str, seconds: float) -> object:
            import os

            found = look(mark, token, seconds)
            if found[-1] or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
                return found  # without a look at torch, which takes seconds
            import torch

            return *found, torch.cuda.get_device_name() if torch.cuda.is_available() else ""

        def run(self, shard: int | None, job: Any) -> tuple[list[Any], str | None]:
            """Work on a shard, or for None finish what is left: what is finished, and an error.
            job: with the first one."""
            import torch

            from kava_core.errors import KavaError
            from kava_core.parallel.overlap import Overlap

            try:
                if job is not None:
                    torch.set_num_threads(job.threads)
                    self.work: Any = Overlap(job.open())
                return self.work.rest() if shard is None else self.work.run(shard), None
            except KavaError as error:
                return [], str(error)

    return _Worker


@dataclass(frozen=True)
class Demand:
    """What is asked of Ray. workers: so many, None: those that fit with all their threads; threads:
    of one; cpus, gpus: shares of one; patience: seconds without any worker."""

    workers: int | None
    threads: int
    cpus: float
    gpus: float
    patience: float

    def check(self) -> None:
        """KavaError if there is no room for a worker, and none can come."""
        if self.nowhere and not cluster.grows():
            raise KavaError(
                f"expected a machine with room for a worker of {self._worker}, found "
                f"{cluster.described()}. Lower resources.cpus_per_worker or "
                "resources.gpus_per_worker."
            )

    def count(self) -> int:
        """How many workers to have. What may come to a cluster is asked for; on a machine there are
        never more than fit."""
        fit = cluster.places(max(self.cpus, self.threads), self.gpus)
        if cluster.grows():
            return self.workers or max(1, fit)
        # By default all threads of all workers have a core; who asks for more workers gets them.
        return min(self.workers or max(1, fit), cluster.places(self.cpus, self.gpus))

    @property
    def nowhere(self) -> bool:
        """Whether there is no node that could hold a worker."""
        return not cluster.places(self.cpus, self.gpus)

    @property
    def _worker(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"

    def waiting(self) -> str:
        return (
            f"waiting for room for a worker of {self._worker}, for at most {self.patience:g} s "
            f"(resources.wait_for_room); there are {cluster.described()}"
        )

    def missed(self) -> KavaError:
        return KavaError(
            f"expected room for a worker of {self._worker} within {self.patience:g} s, found "
            f"{cluster.described()}. Lower resources.cpus_per_worker or resources.gpus_per_worker, "
            "start nodes with more, or raise resources.wait_for_room; finished work is kept."
        )


@dataclass
class _Worker:
    """An actor; node: once it has shown itself; shard: on which it works; writing: the one before,
    if that may not be finished; resting: whether it has been told that there is nothing but that;
    opened: whether it has the job."""

    number: int
    actor: Any
    node: str = ""
    shard: int | None = None
    writing: int | None = None
    resting: bool = False
    opened: bool = False

    @property
    def shards(self) -> list[int]:
        """Those that are lost with it, in order."""
        return [shard for shard in (self.writing, self.shard) if shard is not None]


@dataclass
class Pool(Generic[Result]):
    """Workers over the shards of a queue.

    then: the shards that can be worked on once one is done. examples: in a shard, by its result.
    """

    job: Any
    queue: deque[int]
    demand: Demand
    folder: Path
    then: Callable[[int], Sequence[int]]
    examples: Callable[[int, Result], int]
    meter: Meter
    workers: list[_Worker] = field(default_factory=list)
    calls: dict[Any, _Worker] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)  # shard → workers that it has cost
    unseen: int = 0  # workers that were lost one after the other before they showed themselves
    engaged: int = 0
    first: Host | None = None  # that showed itself
    mixed: bool = False  # whether it was said that not all have GPUs of its kind

    def results(self) -> Iterator[tuple[int, Result]]:
        """(shard, result), as they come."""
        import ray

        self.demand.check()
        self.wanted, self.counted = self.demand.count(), time.monotonic()
        self.since, self.told = time.monotonic(), False  # without a worker; whether that was said
        self.sent = ray.put(self.job)
        try:
            with shared(self.folder) as self.common:
                self._engage()
                while self.queue or any(worker.shards for worker in self.workers):
                    ready, _ = ray.wait(list(self.calls), timeout=LOOK_SECONDS)
                    for call in ready:
                        yield from self._answered(call, self.calls.pop(call))
                    self._look()
                    self.meter.say()
            self.meter.say(now=True)
        finally:
            for worker in self.workers:
                self._end(worker)

    def _look(self) -> None:
        """See what has changed on the cluster; KavaError if there has been no worker for long."""
        now = time.monotonic()
        if now - self.counted > COUNT_SECONDS:
            self.wanted, self.counted = self.demand.count(), now
        self._engage()
        if any(worker.node for worker in self.workers):
            self.since, self.told = now, False
        elif now - self.since > self.demand.patience:
            raise self.demand.missed()
        elif not self.told and (now - self.since > SLOW_SECONDS or self.demand.nowhere):
            self.told = True
            say(self.demand.waiting())

    def _engage(self) -> None:
        """Ask for workers as long as there are shards that nobody has."""
        import ray

        busy = sum(worker.shard is not None for worker in self.workers)
        for _ in range(min(self.wanted, len(self.queue) + busy) - len(self.workers)):
            actor: Any = (
                ray.remote(_worker_class())
                .options(
                    num_cpus=self.demand.cpus,
                    num_gpus=self.demand.gpus,
                    runtime_env={
                        "env_vars": cluster.worker_environment(
                            self.demand.threads, self.demand.gpus
                        )
                    },
                )
                .remote()
            )
            worker = _Worker(self.engaged, actor)
            self.engaged += 1
            self.workers.append(worker)
            common: Common = self.common
            call = actor.look.remote(str(common.mark), common.token, SEEN_WITHIN)
            self.calls[call] = worker

    def _answered(self, call: Any, worker: _Worker) -> Iterator[tuple[int, Result]]:
        import ray
        from ray.exceptions import RayActorError, RayError

        try:
            answer = ray.get(call)
        except RayActorError as error:
            self._lose(worker, error)
            return
        except RayError as error:
            raise KavaError(
                f"a worker failed: {error}. Finished shards are kept; run the stage again to go "
                "on, or with resources.workers: 0 to see the error itself."
            ) from error
        if not worker.node:
            host = Host(*answer)
            self.common.check(host)
            self._compare(host)
            worker.node, self.unseen = host.name, 0
            self._give()
            return
        finished, error_text = answer
        if error_text is not None:
            raise KavaError(error_text)
        done = {each.shard for each in finished}
        left = [shard for shard in worker.shards if shard not in done]
        worker.writing, worker.shard, worker.resting = next(iter(left), None), None, False
        for each in finished:
            self.queue.extendleft(reversed(self.then(each.shard)))
        self._give()  # before the caller looks at the result, so that no worker waits for that
        for each in finished:
            examples = self.examples(each.shard, each.result)
            self.meter.note(worker.number, worker.node, examples, each.seconds)
            yield each.shard, each.result

    def _compare(self, host: Host) -> None:
        """Say so, once, where a worker has a GPU of another kind than the first one had."""
        first = self.first = self.first or host
        if host.gpu != first.gpu and not self.mixed:
            self.mixed = True
            warn(
                f"GPUs of different kinds: {first.gpu or 'none'} on {first.name}, "
                f"{host.gpu or 'none'} on {host.name}. The last bits of a shard tell which one "
                "made it: for equal bytes let a run see one kind."
            )

    def _give(self) -> None:
        for worker in self.workers:
            if not worker.node or worker.shard is not None or worker.resting:
                continue
            if self.queue:
                worker.shard = self.queue.popleft()
                job = None if worker.opened else self.sent
                worker.opened = True
                self.calls[worker.actor.run.remote(worker.shard, job)] = worker
            elif worker.writing is not None:
                worker.resting = True
                self.calls[worker.actor.run.remote(None, None)] = worker

    def _lose(self, worker: _Worker, error: Exception) -> None:
        """A worker has died, or its node has: its shard is another's. KavaError where it seems to
        be the shard that they die of."""
        self.workers.remove(worker)
        self._end(worker)
        reason = str(error).strip().splitlines()[0]
        if not worker.node:
            self.unseen += 1
            if self.unseen > RETRIES * self.wanted:
                raise KavaError(
                    f"{self.unseen} workers died while they started ({reason}). Look at Ray's logs "
                    "of their node; finished shards are kept, and the same command goes on."
                )
            return
        if not worker.shards:  # it had nothing to do
            return
        names = " and ".join(map(str, worker.shards))
        say(f"worker {worker.number} on {worker.node} was lost in shard {names}: once more")
        self.queue.extendleft(reversed(worker.shards))
        for shard in worker.shards:
            if not getattr(error, "preempted", False):
                self.lost[shard] = self.lost.get(shard, 0) + 1
            if self.lost.get(shard, 0) > RETRIES:
                raise KavaError(
                    f"{RETRIES + 1} workers died in shard {shard} ({reason}). Finished shards are "
                    "kept; run the stage again to go on, or with resources.workers: 0 to see the "
                    "error itself."
                )
        self._give()

    def _end(self, worker: _Worker) -> None:
        import ray
        from ray.exceptions import RayError

        with suppress(RayError, ValueError):  # it, or Ray, may be gone
            ray.kill(worker.actor)
