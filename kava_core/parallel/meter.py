"""How fast each worker is: said now and then, and told to Ray where that was asked for."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from kava_core import console

FEW = 8  # workers that are named one by one


@dataclass
class Pace:
    """What a worker has done so far; seconds: of work, without starting and loading."""

    worker: int
    node: str
    shards: int = 0
    examples: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return self.examples / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{self.worker} on {self.node} {self.examples}, {self.per_second:.3g}/s"


class Meter:
    """The paces of all workers; metrics: whether Ray is told of them, too."""

    def __init__(self, metrics: bool) -> None:
        self.paces: dict[int, Pace] = {}
        self.said = time.monotonic()
        self.gauges = _Gauges() if metrics else None

    def note(self, worker: int, node: str, examples: int, seconds: float) -> None:
        """A worker has finished a shard."""
        pace = self.paces.setdefault(worker, Pace(worker, node))
        pace.shards += 1
        pace.examples += examples
        pace.seconds += seconds
        if self.gauges:
            self.gauges.show(pace, examples)

    def say(self, *, now: bool = False) -> None:
        """A line of the log, if it is time for one."""
        if not self.paces or (not now and time.monotonic() - self.said < console.pause()):
            return
        self.said = time.monotonic()
        figures = [
            {"worker": p.worker, "node": p.node, "shards": p.shards, "examples": p.examples,
             "per_second": float(f"{p.per_second:.4g}")}
            for p in self.paces.values()
        ]  # fmt: skip
        console.tell(f"workers, examples: {self._told()}", workers=figures)

    def _told(self) -> str:
        paces = list(self.paces.values())
        if len(paces) <= FEW:
            return "; ".join(str(pace) for pace in paces)
        slow, fast = (choose(paces, key=lambda p: p.per_second) for choose in (min, max))
        middle = statistics.median(pace.per_second for pace in paces)
        total = sum(pace.examples for pace in paces)
        return f"{len(paces)} have {total}, median {middle:.3g}/s; slowest {slow}; fastest {fast}"


class _Gauges:
    """Ray's metrics, which its agents show to Prometheus."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        pipeline, stage = console.at_work()
        tags = ("pipeline", "stage", "worker", "node")
        self.own = {"pipeline": pipeline, "stage": stage}
        self.examples = Counter("kava_examples", "Examples that are finished.", tags)
        self.shards = Counter("kava_shards", "Shards that are finished.", tags)
        self.rate = Gauge("kava_examples_per_second", "Examples a second of work.", tags)

    def show(self, pace: Pace, examples: int) -> None:
        tags = {**self.own, "worker": str(pace.worker), "node": pace.node}
        if examples:
            self.examples.inc(examples, tags)
        self.shards.inc(1, tags)
        self.rate.set(pace.per_second, tags)
