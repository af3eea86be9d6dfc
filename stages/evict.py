"""kv_targets ← teacher_kv: caches cut down to M slots per layer and head, without the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kava_core.artefacts import publish, work_folder, write_json
from kava_core.console import progress, say
from kava_core.settings import EveryLayer, Evict, LastLayers

from .run import Run, stage, store_codec

if TYPE_CHECKING:
    from kava_core.eviction import CacheBatch, Policy, Targets
    from kava_core.store import Geometry, Ranges, TargetsStore, TeacherShard, TeacherStore


@dataclass(frozen=True)
class Plan:
    """The eviction settings against the geometry of one teacher store.

    layers: the teacher layers that keep targets; groups: indices into them, in runs that share;
    budgets: slots per layer, or per group where layers share.
    """

    policy: Policy
    layers: list[int]
    groups: list[list[int]]
    budgets: list[int]
    share: Any
    phase: Any
    geometry: Geometry

    @classmethod
    def of(cls, settings: Evict, source: Geometry) -> Plan:
        """source: of the caches to be cut. KavaError names the setting that cannot be met."""
        from kava_core.eviction import group_layers, make_budgets, parse_layers
        from kava_core.store import Geometry

        layers = parse_layers(_layers(settings), source.model_layers)
        size = settings.share_size if settings.share != "none" else 1
        groups = group_layers(len(layers), size)
        budgets = make_budgets(settings.budget_shape, len(groups), settings.budget)
        geometry = Geometry(
            model_layers=source.model_layers,
            layers=tuple(layers),
            groups=tuple(tuple(layers[i] for i in group) for group in groups),
            share=settings.share,
            kv_heads=source.kv_heads,
            head_dim=source.head_dim,
            hidden_size=source.hidden_size,
            slots=max(budgets),
        )
        return cls(
            settings.policy, layers, groups, budgets, settings.share, settings.phase, geometry
        )

    def cut(self, caches: CacheBatch) -> Targets:
        """The targets of some traces, from caches of all layers."""
        from kava_core.eviction import evict as evict_batch

        return evict_batch(
            caches.choose_layers(self.layers),
            self.policy,
            self.budgets,
            share=self.share,
            groups=None if self.share == "none" else self.groups,
            rotary_phase=self.phase,
        )


@dataclass(frozen=True)
class EvictJob:
    """Shard k of the teacher store → shard k of the targets, in `folder`."""

    teacher_kv: Path
    folder: Path
    settings: Evict
    ranges: Ranges | None

    @property
    def threads(self) -> int:
        return self.settings.threads

    def open(self) -> Callable[[int], dict[str, Any]]:
        from kava_core.store import TeacherStore, write_targets_shard

        store = TeacherStore.open(self.teacher_kv)
        plan = Plan.of(self.settings, store.geometry)

        def work(number: int) -> dict[str, Any]:
            shard = store.shard(number)
            targets = plan.cut(_batch(shard, store))
            write_targets_shard(
                self.folder,
                number,
                shard.records,
                keys=targets.keys,
                values=targets.values,
                slot_counts=targets.slot_counts,
                slot_positions=targets.slot_positions,
                endpoint=shard.endpoint.dequantise(),
                geometry=plan.geometry,
                codec=store_codec(self.settings),
                ranges=self.ranges,
            )
            return {"examples": len(shard)}

        return work


@stage
def evict(run: Run) -> None:
    """Cut the teacher's caches down to M slots per layer and head.

    Writes kv_targets/, from which students are trained without the teacher, and eviction.json with
    the share of (record, layer, head) from which a token was really dropped. A new budget, policy,
    layer set or bit width reruns this stage and what follows, nothing before.
    """
    from kava_core.parallel.shards import run_shards
    from kava_core.rotary import Rotary
    from kava_core.store import TargetsStore, TeacherStore, finalise, finished_shards

    settings = run.settings.evict
    source = run.path("teacher_kv")
    store = TeacherStore.open(source)
    plan = Plan.of(settings, store.geometry)
    fingerprints = {**store.manifest.fingerprints, "teacher_kv": store.manifest.digest}
    plain = settings.model_dump(mode="json", by_alias=True)
    output = run.path("kv_targets")
    work = work_folder(output, "evict", {"settings": plain, "inputs": fingerprints})
    folder = work / "output"
    folder.mkdir(exist_ok=True)
    ranges = _ranges(settings, plan, store)
    done = finished_shards(folder)
    todo = sorted(set(range(store.shards)) - done)
    if done:
        say(f"evict: {len(done)} of {store.shards} shards are finished already")
    resources = run.settings.resources
    began, examples = time.perf_counter(), 0
    with progress() as display:
        task = display.add_task("evict (shards)", total=store.shards, completed=len(done), note="")
        for _, result in run_shards(
            EvictJob(source, folder, settings, ranges),
            todo,
            workers=resources.workers,
            cpus_per_worker=resources.cpus_per_worker,
        ):
            examples += result["examples"]
            rate = examples / (time.perf_counter() - began)
            display.update(task, advance=1, note=f"{examples} examples, {rate:.0f} examples/s")
    rotary = store.manifest.rotary
    manifest = finalise(
        folder,
        "kv_targets",
        shards=store.shards,
        geometry=plan.geometry,
        codec=store_codec(settings),
        rotary_phase=settings.phase,
        rotary=Rotary.from_json(rotary.model_dump(include={"inv_freq", "scaling"})),
        settings={**store.manifest.settings, "evict": plain},
        fingerprints=fingerprints,
        ranges=ranges,
    )
    publish((folder, output))
    metrics = _metrics(TargetsStore.open(output))
    write_json(run.path("eviction.json"), metrics)
    say(
        f"kv_targets: {manifest.records} records, {metrics['megabytes']:.1f} MB; eviction engaged "
        f"on {metrics['engaged_percent']:.1f} % of (record, layer, head)"
    )


def _metrics(store: TargetsStore) -> dict[str, float]:
    """What eviction did, read from the finished store, so that a continued run counts alike.

    engaged_percent: of (record, layer, head), those from which a token was really dropped;
    kept_percent: of all tokens there, those that fill a slot.
    """
    import torch

    lengths = torch.from_numpy(store.index.column("n_cot")).long()  # [records]
    engaged = places = kept = tokens = 0
    first = 0
    for size in store.sizes:
        counts = store.batch(range(first, first + size)).slot_counts.long()  # [N, L', H]
        whole = lengths[first : first + size, None, None].expand_as(counts)
        engaged += int((counts < whole).sum())
        places += counts.numel()
        kept += int(counts.sum())
        tokens += int(whole.sum())
        first += size
    return {
        "engaged_percent": 100 * engaged / places,
        "kept_percent": 100 * kept / tokens,
        "megabytes": sum(info.bytes for info in store.manifest.files.values()) / 1e6,
    }


def _layers(settings: Evict) -> Any:
    if isinstance(settings.layers, LastLayers | EveryLayer):
        return settings.layers.model_dump()
    return settings.layers if settings.layers == "all" else list(settings.layers)


def _batch(shard: TeacherShard, store: TeacherStore) -> CacheBatch:
    from kava_core.eviction import CacheBatch
    from kava_core.rotary import Rotary

    rotary = store.manifest.rotary
    return CacheBatch.from_ragged(
        shard.keys.dequantise(),
        shard.values.dequantise(),
        shard.importance,
        shard.offsets,
        [record.id for record in shard.records],
        rotary=Rotary.from_json(rotary.model_dump(include={"inv_freq", "scaling"})),
        cot_start=[len(record.question_ids) for record in shard.records],
    )


def _ranges(settings: Evict, plan: Plan, store: TeacherStore) -> Ranges | None:
    """Calibrated ranges of the targets of the first records; None where tokens have their own."""
    if settings.granularity == "token":
        return None
    from kava_core.store import calibrate

    samples, seen = [], 0
    for number in range(store.shards):
        targets = plan.cut(_batch(store.shard(number), store))
        valid = (targets.slot_positions >= 0).all(dim=(1, 2))  # [B, M] filled in all rows, heads
        samples.append(
            tuple(x.permute(0, 3, 1, 2, 4)[valid] for x in (targets.keys, targets.values))
        )
        seen += len(targets.lengths)
        if seen >= settings.calibration_records:
            break
    return calibrate(samples, settings.granularity, settings.calibration_percentile)  # type: ignore[arg-type]
