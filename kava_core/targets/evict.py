"""kv_targets ← teacher_kv: caches cut down to M slots per layer and head, without the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kava_core.artefacts import work_folder
from kava_core.eviction import CacheBatch
from kava_core.parallel.overlap import Computed
from kava_core.rotary import Rotary
from kava_core.settings import Evict, Resources
from kava_core.store import (
    Ranges,
    StorePath,
    StoreSpec,
    TeacherStore,
    Work,
    calibrate,
    write_targets_shard,
)
from kava_core.targets.build import Build, ShardCounts, build_store
from kava_core.targets.plan import Plan
from kava_core.targets.specs import store_codec

AHEAD = 3  # shards of a remote store: workers that share a cache take turns with them


@dataclass(frozen=True)
class EvictJob:
    """Shard k of the teacher store → shard k of the targets, in `folder`."""

    teacher_kv: StorePath
    folder: Path
    plan: Plan
    spec: StoreSpec

    @property
    def threads(self) -> int:
        return self.plan.settings.threads

    def open(self) -> Callable[[int], Computed[ShardCounts]]:
        store = TeacherStore.open(self.teacher_kv)

        def work(number: int) -> Computed[ShardCounts]:
            store.fetch_ahead([number], range(number + 1, min(number + AHEAD, store.shards)))
            shard = store.shard(number)
            targets = self.plan.cut(cache_batch(store, number))

            def finish() -> ShardCounts:
                write_targets_shard(
                    self.folder,
                    self.spec,
                    number,
                    shard.records,
                    keys=targets.keys,
                    values=targets.values,
                    slot_counts=targets.slot_counts,
                    slot_positions=targets.slot_positions,
                    endpoint=shard.endpoint.dequantise(),
                )
                return ShardCounts(examples=len(shard), tokens=int(shard.offsets[-1]))

            return Computed(finish)

        return work


def build_kv_targets(
    teacher_kv: StorePath, settings: Evict, output: Path, resources: Resources
) -> Build:
    """Cut the caches of a teacher store, in a folder or at a URL; the targets are built in the work
    of `output`.

    KavaError names the setting that cannot be met by this teacher's layers.
    """
    store = TeacherStore.open(teacher_kv)
    plan = Plan.of(settings, store.geometry)
    plain = settings.model_dump(mode="json", by_alias=True)
    fingerprints = {**store.manifest.fingerprints, "teacher_kv": store.manifest.digest}
    folder = work_folder(output, "evict", {"settings": plain, "inputs": fingerprints})
    work = Work.of(folder, resources.targets_to)
    if (found := work.found()) is not None:
        return Build(work.result, found, url=work.where)
    caches = (cache_batch(store, number) for number in range(store.shards))
    spec = targets_spec(plan, store.manifest.rotary.rotation, caches)
    return build_store(
        EvictJob(teacher_kv, work.folder, plan, spec),
        store.shards,
        work,
        done=work.finished(),
        finish=partial(
            work.finalise,
            spec,
            shards=store.shards,
            settings={**store.manifest.settings, "evict": plain},
            fingerprints=fingerprints,
        ),
        # It works on the CPU.
        resources=resources.model_copy(update={"device": "cpu", "gpus_per_worker": None}),
    )


def targets_spec(plan: Plan, rotary: Rotary | None, caches: Iterable[CacheBatch]) -> StoreSpec:
    """Of the targets of a teacher's caches, in the order of their records; as many are taken as the
    codec needs for its ranges. rotary: of that teacher."""
    settings = plan.settings
    ranges = calibrate_ranges(plan, caches)
    return StoreSpec(plan.geometry, store_codec(settings), settings.phase, rotary, ranges)


def cache_batch(store: TeacherStore, number: int) -> CacheBatch:
    """The caches of all layers of a shard of a teacher store, as eviction takes them."""
    shard = store.shard(number)
    return CacheBatch.of_records(
        shard.keys.dequantise(),
        shard.values.dequantise(),
        shard.importance,
        shard.offsets,
        shard.records,
        store.manifest.rotary.rotation,
    )


def calibrate_ranges(plan: Plan, caches: Iterable[CacheBatch]) -> Ranges | None:
    """Ranges for the targets, from those of the first records; None where tokens have their own.

    Each row's are those of its own slots: a budget that falls with depth fills fewer in some.
    """
    settings = plan.settings
    if settings.granularity == "token":
        return None
    samples: list[list[tuple[Tensor, Tensor]]] = [[] for _ in plan.geometry.rows]
    seen = 0
    for batch in caches:
        targets = plan.cut(batch)
        filled = (targets.slot_positions >= 0).all(dim=2)  # [B, L', M] in all heads
        keys, values = (x.transpose(2, 3) for x in (targets.keys, targets.values))
        for row, sample in enumerate(samples):
            valid = filled[:, row]
            # [T, 1, H, D]
            sample.append((keys[:, row][valid][:, None], values[:, row][valid][:, None]))
        seen += len(targets.lengths)
        if seen >= settings.calibration_records:
            break
    found = [
        calibrate(sample, settings.granularity, settings.calibration_percentile)
        for sample in samples
    ]
    names = (field.name for field in fields(Ranges))
    return Ranges(*(torch.cat([getattr(each, name) for each in found]) for name in names))
