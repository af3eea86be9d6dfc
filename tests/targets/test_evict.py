"""A targets store: the cuts of a teacher's caches, shard by shard, and what they left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core.artefacts import work_folder
from kava_core.eviction import CacheBatch
from kava_core.eviction.policies.attention import Attention
from kava_core.settings import Evict, Generate, Resources
from kava_core.store import TargetsStore, TeacherStore, calibrate
from kava_core.store.summary import eviction_findings
from kava_core.targets.build import Build
from kava_core.targets.evict import (
    EvictJob,
    build_kv_targets,
    cache_batch,
    calibrate_ranges,
    targets_spec,
)
from kava_core.targets.plan import Plan
from tests.distill.toy import toy_traces
from tests.stages.project import digest
from tests.targets.caches import FINGERPRINTS, with_steps, write_caches

EXACT = {"keys_bits": 32, "values_bits": 32, "endpoint_bits": 32}
TRACES = with_steps(toy_traces(14))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    """Caches of 14 traces of 1 to some tokens, in three shards."""
    folder = tmp_path_factory.mktemp("caches") / "data/one/teacher_kv"
    return write_caches(folder, "llama", TRACES, Generate(**EXACT))


def batches(caches: TeacherStore) -> Iterator[CacheBatch]:
    return (cache_batch(caches, number) for number in range(caches.shards))


def evicted(
    caches: TeacherStore, settings: Evict, folder: Path, resources: Resources | None = None
) -> Build:
    output = folder / "data/one/kv_targets"
    return build_kv_targets(caches.path, settings, output, resources or Resources(workers=0))


@pytest.mark.parametrize("share", ["none", "selection", "merged"])
def test_every_shard_is_cut_by_the_plan(caches: TeacherStore, tmp_path: Path, share: str) -> None:
    settings = Evict.model_validate(
        {"budget": 4, "budget_shape": "pyramid", "share": share, "phase": "post_rope", **EXACT}
    )
    built = evicted(caches, settings, tmp_path)
    store, plan = TargetsStore.open(built.folder), Plan.of(settings, caches.geometry)
    assert store.geometry == plan.geometry and store.sizes == caches.manifest.shards
    assert store.manifest.rotary.phase == "post_rope"
    assert (built.examples, built.tokens) == (14, caches.manifest.trace_tokens)
    first = 0
    for number in range(caches.shards):
        shard, expected = caches.shard(number), plan.cut(cache_batch(caches, number))
        found = store.batch(range(first, first + len(shard))).dequantise()
        for name in ("keys", "values", "slot_counts", "slot_positions"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(found.endpoint, shard.endpoint.dequantise())
        assert [store.index.record(first + i) for i in range(len(shard))] == shard.records
        first += len(shard)


def test_the_manifest_says_all_that_the_targets_were_made_from(
    caches: TeacherStore, tmp_path: Path
) -> None:
    settings = Evict(budget=3, policy=Attention())
    built = evicted(caches, settings, tmp_path)
    assert built.manifest.fingerprints == {**FINGERPRINTS, "teacher_kv": caches.manifest.digest}
    assert built.manifest.settings == {
        **caches.manifest.settings,
        "evict": settings.model_dump(mode="json", by_alias=True),
    }
    assert built.manifest.settings["evict"]["policy"] == {"name": "attention"}
    assert built.manifest.rotary.inv_freq == caches.manifest.rotary.inv_freq
    assert Plan.of_store(TargetsStore.open(built.folder)) == Plan.of(settings, caches.geometry)


def test_other_settings_and_other_caches_have_work_of_their_own(
    caches: TeacherStore, tmp_path: Path
) -> None:
    output = tmp_path / "data/one/kv_targets"
    one, two = Evict(budget=3), Evict(budget=4)
    folders = [evicted(caches, settings, tmp_path).folder for settings in (one, two, one)]
    assert folders[0] == folders[2] != folders[1]
    key = {
        "settings": one.model_dump(mode="json", by_alias=True),
        "inputs": {**FINGERPRINTS, "teacher_kv": caches.manifest.digest},
    }
    assert folders[0] == work_folder(output, "evict", key) / "output"


def test_a_shards_caches_are_those_of_its_records(caches: TeacherStore) -> None:
    batch, shard = cache_batch(caches, 1), caches.shard(1)
    assert list(batch.ids) == [record.id for record in shard.records]
    assert batch.lengths == [len(record.cot_ids) for record in shard.records]
    assert list(batch.cot_start or ()) == [len(record.question_ids) for record in shard.records]
    assert torch.equal(batch.keys, shard.keys.dequantise())
    assert torch.equal(batch.values, shard.values.dequantise())
    assert batch.importance is not None and torch.equal(batch.importance, shard.importance)
    assert batch.step_ends == tuple(tuple(record.step_ends) for record in shard.records)
    assert batch.results == tuple(tuple(record.results) for record in shard.records)
    assert batch.rotary is not None
    assert batch.rotary.to_json() == caches.manifest.rotary.model_dump(
        mode="json", exclude={"phase"}
    )


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("shape", ["uniform", "pyramid"])
@pytest.mark.parametrize(("records", "shards"), [(1, 1), (6, 1), (7, 2), (1000, 3)])
def test_a_rows_ranges_are_those_of_its_slots_in_the_first_records(
    caches: TeacherStore, granularity: str, shape: str, records: int, shards: int
) -> None:
    settings = Evict.model_validate(
        {
            "budget": 4,
            "budget_shape": shape,
            "keys_bits": 8,
            "granularity": granularity,
            "calibration_records": records,
            "calibration_percentile": 90.0,
        }
    )
    plan = Plan.of(settings, caches.geometry)
    found = calibrate_ranges(plan, batches(caches))
    assert found is not None
    cuts = [plan.cut(cache_batch(caches, number)) for number in range(shards)]
    for row in range(3):
        samples = []
        for targets in cuts:
            for i, count in enumerate(targets.slot_counts[:, row, 0].tolist()):
                kept = (
                    x[i, row, :, :count].transpose(0, 1) for x in (targets.keys, targets.values)
                )
                samples.append(tuple(x[:, None] for x in kept))
        expected = calibrate(samples, granularity, 90.0)  # type: ignore[arg-type]
        for name, value in vars(expected).items():
            assert torch.equal(getattr(found, name)[row], value[0]), name
    assert targets_spec(
        plan, caches.manifest.rotary.rotation, batches(caches)
    ).calibration.keys() == {"keys_scale", "keys_zero"}


def test_tokens_with_ranges_of_their_own_need_no_calibration(caches: TeacherStore) -> None:
    plan = Plan.of(Evict(budget=4, keys_bits=8), caches.geometry)
    assert calibrate_ranges(plan, batches(caches)) is None
    assert targets_spec(plan, caches.manifest.rotary.rotation, batches(caches)).calibration == {}


# --- what eviction did ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{}, {"budget_shape": "pyramid"}, {"share": "merged"}, {"budget": 1000}]
)
def test_a_stores_metrics_are_those_of_the_targets_in_it(
    caches: TeacherStore, tmp_path: Path, change: dict[str, Any]
) -> None:
    settings = Evict.model_validate({"budget": 4, **change})
    store = TargetsStore.open(evicted(caches, settings, tmp_path).folder)
    plan = Plan.of(settings, caches.geometry)
    cuts = [plan.cut(cache_batch(caches, number)) for number in range(caches.shards)]
    engaged = torch.cat([targets.engaged for targets in cuts])
    kept = torch.cat([targets.slot_counts for targets in cuts])
    tokens = torch.cat([targets.lengths for targets in cuts])[:, None, None].expand_as(kept)
    found = eviction_findings(store)
    assert found.engaged_percent == pytest.approx(100 * engaged.double().mean().item())
    assert found.kept_percent == pytest.approx(100 * kept.sum().item() / tokens.sum().item())
    files = [file for file in store.path.iterdir() if file.name != "manifest.json"]
    assert found.megabytes == pytest.approx(sum(f.stat().st_size for f in files) / 1e6)
    if settings.budget == 1000:
        assert (found.engaged_percent, found.kept_percent) == (0, 100)


@pytest.mark.parametrize(("select", "policy"), [("head", "random"), ("record", "rkv")])
def test_slots_chosen_once_for_a_record_agree(
    caches: TeacherStore, tmp_path: Path, select: str, policy: str
) -> None:
    settings = Evict.model_validate({"budget": 2, "select": select, "policy": policy})
    agreed = eviction_findings(TargetsStore.open(evicted(caches, settings, tmp_path).folder))
    assert (agreed.agreement_percent == 100) == (select == "record")


def test_a_killed_stage_goes_on_where_it_was(caches: TeacherStore, tmp_path: Path) -> None:
    settings = Evict(budget=4)
    whole = evicted(caches, settings, tmp_path / "whole")
    plan = Plan.of(settings, caches.geometry)
    key = {
        "settings": settings.model_dump(mode="json", by_alias=True),
        "inputs": {**FINGERPRINTS, "teacher_kv": caches.manifest.digest},
    }
    folder = work_folder(tmp_path / "data/one/kv_targets", "evict", key) / "output"
    folder.mkdir()
    job = EvictJob(
        caches.path,
        folder,
        plan,
        targets_spec(plan, caches.manifest.rotary.rotation, batches(caches)),
    )
    job.open()(1).finish()
    rest = evicted(caches, settings, tmp_path)
    assert rest.folder == folder
    assert rest.examples == 14 - len(caches.shard(1))
    assert rest.manifest == whole.manifest


@pytest.mark.usefixtures("two_cores")
def test_workers_need_no_gpu(caches: TeacherStore, tmp_path: Path) -> None:
    """Nor do they wait for the share of one that is meant for those of `generate`."""
    one = evicted(caches, Evict(budget=4), tmp_path / "one")
    many = evicted(caches, Evict(budget=4), tmp_path / "many", Resources(gpus_per_worker=1))
    assert digest(one.folder) == digest(many.folder)
