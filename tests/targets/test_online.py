"""Targets made in the step are those of the store: the proof that the store loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stages.common import store_codec
from torch import Tensor

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.match import Match
from kava_core.distill.student import student_terms
from kava_core.models.latent import LatentReasoner
from kava_core.models.teacher_pass import TeacherPass, over
from kava_core.record import Record
from kava_core.settings import Evict, Generate
from kava_core.store import (
    TargetsStore,
    TeacherStore,
    finalise,
    write_targets_shard,
    write_teacher_shard,
)
from kava_core.targets.online import OnlineTargets
from stages.evict import Plan, _batch, _ranges
from stages.generate import store_geometry
from tests.distill.toy import toy_objective, toy_traces
from tests.tiny import EOS, PROMPT, tiny_model

EXACT = {"keys_bits": 32, "values_bits": 32, "endpoint_bits": 32}
FINGERPRINTS = {"problems": "p", "teacher": "t", "tokenizer": "k"}
ORDER = [5, 0, 9, 3]


def made(
    folder: Path, architecture: str, generate: Generate, evict: Evict
) -> tuple[TargetsStore, OnlineTargets, list[Record]]:
    """A store made as the stages make it, by the shard and in batches of their own, and the same
    targets online."""
    traces = toy_traces(12)
    teacher = TeacherPass(tiny_model(architecture, torch.float32))
    geometry = store_geometry(teacher.model.config)
    for shard in range(2):
        records = traces[6 * shard : 6 * shard + 6]
        cache = over(teacher, records, batch_size=2)
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        write_teacher_shard(
            folder / "cache", shard, records, keys=cache.keys, values=cache.values,
            importance=cache.importance, endpoint=cache.endpoint, geometry=geometry,
            codec=store_codec(generate),
        )  # fmt: skip
    common: dict[str, Any] = {"shards": 2, "rotary": teacher.rotary, "settings": {}}
    finalise(
        folder / "cache", "teacher_kv", geometry=geometry, codec=store_codec(generate),
        rotary_phase="pre_rope", fingerprints=FINGERPRINTS, **common,
    )  # fmt: skip
    caches = TeacherStore.open(folder / "cache")
    plan = Plan.of(evict, caches.geometry)
    ranges = _ranges(evict, plan, caches)
    (folder / "targets").mkdir()
    for number in range(2):
        shard = caches.shard(number)
        targets = plan.cut(_batch(shard, caches))
        write_targets_shard(
            folder / "targets", number, shard.records, keys=targets.keys, values=targets.values,
            slot_counts=targets.slot_counts, slot_positions=targets.slot_positions,
            endpoint=shard.endpoint.dequantise(), geometry=plan.geometry,
            codec=store_codec(evict), ranges=ranges,
        )  # fmt: skip
    finalise(
        folder / "targets", "kv_targets", geometry=plan.geometry, codec=store_codec(evict),
        rotary_phase=evict.phase, fingerprints={**FINGERPRINTS, "teacher_kv": "c"}, ranges=ranges,
        **common,
    )  # fmt: skip
    store = TargetsStore.open(folder / "targets")
    plan = Plan.of(evict, store.geometry)  # from the targets alone
    return store, OnlineTargets.like(store, teacher, store_codec(generate), plan.cut), traces


def losses(
    architecture: str, store: TargetsStore, online: OnlineTargets | None
) -> dict[str, Tensor]:
    student = LatentReasoner.from_teacher(
        tiny_model(architecture, torch.float32),
        latents=store.geometry.slots,
        iterations=2,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=PROMPT,
        eos_token_id=EOS,
        seed=0,
    ).eval()
    dataset = TargetsDataset(store, chains=True, online=online is not None)
    terms = student_terms(toy_objective(store, w_cot=1.0), Match.of(store), online)
    return terms(student, dataset.__getitems__(ORDER))


CASES = {
    "float32": (Generate(**EXACT), Evict(budget=4, **EXACT)),
    "bfloat16": (Generate(), Evict(budget=4, **{"lambda": 0.5})),
    "bfloat16, rotated, two layers, a pyramid": (
        Generate(),
        Evict(budget=4, phase="post_rope", layers={"last": 2}, budgets="pyramid"),  # type: ignore[arg-type]
    ),
    "codes of 8 bits, merged": (
        Generate(keys_bits=8, values_bits=8),
        Evict(budget=3, keys_bits=8, values_bits=4, share="merged"),
    ),
    "codes with ranges of their own": (
        Generate(**EXACT),
        Evict(budget=4, keys_bits=8, values_bits=8, granularity="channel"),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_online_and_stored_targets_give_the_same_loss(
    tmp_path: Path, architecture: str, case: str
) -> None:
    store, online, _ = made(tmp_path, architecture, *CASES[case])
    with torch.no_grad():
        stored, anew = losses(architecture, store, None), losses(architecture, store, online)
    assert set(stored) == {"answer", "cot", "codi", "kv"}
    # One number of a thousand may be rounded the other way in a batch of another shape.
    tolerance = 1e-5 if case == "float32" else 5e-4
    for name, value in stored.items():
        assert float(anew[name]) == pytest.approx(float(value), rel=tolerance), name


def test_online_targets_are_the_stored_ones_slot_by_slot(tmp_path: Path) -> None:
    store, online, _ = made(tmp_path, "llama", *CASES["float32"])
    stored = store.batch(ORDER).dequantise()
    anew = online([store.index.record(i) for i in ORDER])
    assert torch.equal(anew.slot_positions, stored.slot_positions)
    assert torch.equal(anew.slot_counts, stored.slot_counts)
    assert torch.equal(anew.slot_mask, stored.slot_mask)
    for name in ("keys", "values", "endpoint"):
        torch.testing.assert_close(getattr(anew, name), getattr(stored, name), rtol=1e-5, atol=1e-5)


def test_rounding_is_seen(tmp_path: Path) -> None:
    """Without it, the targets of a coarse store are others: the equality above says something."""
    store, online, _ = made(tmp_path, "llama", *CASES["codes of 8 bits, merged"])
    exact = OnlineTargets(
        online.teacher, store_codec(Generate(**EXACT)), online.cut, online.rounding
    )
    with torch.no_grad():
        stored, other = losses("llama", store, None), losses("llama", store, exact)
    assert float(other["kv"]) != pytest.approx(float(stored["kv"]), rel=5e-4)
    assert float(other["answer"]) == pytest.approx(float(stored["answer"]), rel=1e-6)


def test_mixed_precision_of_the_student_is_not_the_teachers(tmp_path: Path) -> None:
    store, online, _ = made(tmp_path, "llama", *CASES["float32"])
    records = [store.index.record(i) for i in ORDER]
    alone = online(records)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = online(records)
    for name, value in vars(alone).items():
        assert torch.equal(getattr(within, name), value), name


def test_nothing_of_the_teacher_learns(tmp_path: Path) -> None:
    store, online, _ = made(tmp_path, "llama", *CASES["float32"])
    before = {name: x.clone() for name, x in online.teacher.model.state_dict().items()}
    sum(losses("llama", store, online).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in online.teacher.model.parameters())
    assert all(torch.equal(x, before[n]) for n, x in online.teacher.model.state_dict().items())
