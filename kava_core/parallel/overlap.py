"""A shard is written while the next one is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Computed(Generic[Result_co]):
    """A shard whose work has been computed; `finish` writes it, and says what was done."""

    finish: Callable[[], Result_co]


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """A shard that is done, and the seconds it took until the next one could begin."""

    shard: int
    result: Result
    seconds: float


class Overlap(Generic[Result]):
    """Works on one shard after the other. What is computed is finished by a thread of its own, and
    one at a time, so that there are never more than two shards in memory."""

    def __init__(self, work: Callable[[int], Result | Computed[Result]]) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(1)
        self._pending: tuple[int, Future[Result], float] | None = None

    def run(self, shard: int) -> list[Finished[Result]]:
        """Work on a shard; returns those that are finished meanwhile: this one if there is nothing
        more to do for it, the one before if that was being written. An error is that of either, and
        what can be finished is."""
        began = time.perf_counter()
        try:
            made = self._work(shard)
        except BaseException:
            self.rest()
            raise
        if not isinstance(made, Computed):
            return [Finished(shard, made, time.perf_counter() - began)]
        finished = self.rest()
        seconds = time.perf_counter() - began
        self._pending = shard, self._thread.submit(made.finish), seconds
        return finished

    def rest(self) -> list[Finished[Result]]:
        """What is still being written, once it is; nothing if all is."""
        if self._pending is None:
            return []
        (shard, future, seconds), self._pending = self._pending, None
        return [Finished(shard, future.result(), seconds)]

    def close(self) -> None:
        """Once what is being written is."""
        self._thread.shutdown()
