"""The one way a store is made: a job over shards, in a folder where a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kava_core.console import progress, say
from kava_core.parallel.shards import Job, run_shards
from kava_core.settings import Resources
from kava_core.store import Manifest, StoreSpec, TargetsStore, Url, Work
from kava_core.store.counts import EvictionCounts
from kava_core.store.finalise import counted


@dataclass(frozen=True)
class ShardCounts:
    """What went into a shard: its examples, and the tokens of their traces."""

    examples: int
    tokens: int


class ShardJob(Job[ShardCounts], Protocol):
    """A job whose work on shard k writes shard k of a store into `folder`."""

    @property
    def folder(self) -> Path: ...

    @property
    def spec(self) -> StoreSpec: ...


@dataclass(frozen=True)
class Build:
    """A store that is complete but not yet in its place.

    folder: what to publish. examples, tokens, seconds: of this run, which may have found shards
    that were finished before. counts: what eviction did, as it was noted. url: where the store
    lies, if `folder` only stands for it.
    """

    folder: Path
    manifest: Manifest
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    counts: EvictionCounts | None = None
    url: Url | None = None

    @property
    def rate(self) -> str:
        """How fast this run was, for people."""
        if not self.examples:
            return "all of it was there"
        return _rate(self.examples, self.tokens, self.seconds)

    @property
    def where(self) -> str:
        """Where it lies, for people; nothing if that is where it is expected."""
        return "" if self.url is None else f" at {self.url}"


def build_store(
    job: ShardJob,
    shards: int,
    work: Work,
    *,
    done: set[int],
    finish: Callable[[], Manifest],
    resources: Resources,
) -> Build:
    """Run `job` over the shards that are not done, with progress, and finish the store.

    work: the store that `job` writes into. finish: makes one store of all shards
    (`Work.finalise`). resources: where the shards run; nothing of the store depends on them.
    """
    kind = job.spec.kind
    if done:
        say(f"{kind}: {len(done)} of {shards} shards are finished already")
    began = time.perf_counter()
    examples = tokens = 0
    with progress() as display, closing(work):
        task = display.add_task(f"{kind} (shards)", total=shards, completed=len(done), note="")
        for shard in sorted(done):
            work.wrote(shard)
        for shard, counts in run_shards(
            job,
            sorted(set(range(shards)) - done),
            resources,
            folder=job.folder,
            examples=lambda _, counts: counts.examples,
        ):
            work.wrote(shard)
            examples, tokens = examples + counts.examples, tokens + counts.tokens
            rate = _rate(examples, tokens, time.perf_counter() - began)
            display.update(task, advance=1, note=f"{examples} examples, {rate}")
        evicted = counted(job.folder, shards) if kind == TargetsStore.kind else None
        manifest, seconds = finish(), time.perf_counter() - began
    return Build(work.result, manifest, examples, tokens, seconds, evicted, work.where)


def _rate(examples: int, tokens: int, seconds: float) -> str:
    return f"{examples / seconds:.0f} examples/s, {tokens / seconds:.0f} CoT tokens/s"
