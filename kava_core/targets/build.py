"""The one way a store is made: a job over shards, in a folder where a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kava_core.artefacts import ensure_folder
from kava_core.console import progress, say
from kava_core.parallel.shards import Job, run_shards
from kava_core.settings import Resources
from kava_core.store import Manifest, StoreSpec


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

    examples, tokens, seconds: of this run, which may have found shards that were finished before.
    """

    folder: Path
    manifest: Manifest
    examples: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> str:
        """How fast this run was, for people."""
        return _rate(self.examples, self.tokens, self.seconds)


def build_store(
    job: ShardJob,
    shards: int,
    *,
    done: set[int],
    finish: Callable[[], Manifest],
    resources: Resources,
) -> Build:
    """Run `job` over the shards that are not done, with progress, and finish the store.

    finish: makes one store of all shards (`store.finalise`). resources: where the shards run;
    nothing of the store depends on them.
    """
    kind = job.spec.kind
    ensure_folder(job.folder)
    if done:
        say(f"{kind}: {len(done)} of {shards} shards are finished already")
    began = time.perf_counter()
    examples = tokens = 0
    with progress() as display:
        task = display.add_task(f"{kind} (shards)", total=shards, completed=len(done), note="")
        for _, counts in run_shards(
            job,
            sorted(set(range(shards)) - done),
            resources,
            folder=job.folder,
            examples=lambda _, counts: counts.examples,
        ):
            examples, tokens = examples + counts.examples, tokens + counts.tokens
            rate = _rate(examples, tokens, time.perf_counter() - began)
            display.update(task, advance=1, note=f"{examples} examples, {rate}")
    return Build(job.folder, finish(), examples, tokens, time.perf_counter() - began)


def _rate(examples: int, tokens: int, seconds: float) -> str:
    return f"{examples / seconds:.0f} examples/s, {tokens / seconds:.0f} CoT tokens/s"
