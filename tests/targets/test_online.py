"""Targets made in the step are those of the store: the proof that the store loses nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.match import Match
from kava_core.distill.terms import student_terms
from kava_core.eviction.policies.results import Results
from kava_core.eviction.policies.rkv import RKV
from kava_core.eviction.policies.steps import Steps
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import save_model
from kava_core.settings import Evict, Generate, Student
from kava_core.store import TargetsStore, TargetTensors, finalise
from kava_core.targets.evict import EvictJob, cache_batch, targets_spec
from kava_core.targets.online import JointTargets, OnlineTargets
from kava_core.targets.plan import Plan
from kava_core.targets.specs import store_codec
from tests.distill.toy import toy_objective, toy_traces
from tests.targets.caches import with_steps, write_caches
from tests.tiny import EOS, PROMPT, tiny_model

EXACT = {"keys_bits": 32, "values_bits": 32, "endpoint_bits": 32}
ORDER = [5, 0, 9, 3]


def made(
    folder: Path, architecture: str, generate: Generate, evict: Evict
) -> tuple[TargetsStore, OnlineTargets]:
    """A store made as the stages make it, by the shard and in batches of their own, and the same
    targets online, from the store and the teacher's folder alone."""
    save_model(folder / "teacher", tiny_model(architecture, torch.float32), None)
    caches = write_caches(folder / "teacher_kv", architecture, with_steps(toy_traces(12)), generate)
    plan = Plan.of(evict, caches.geometry)
    (folder / "kv_targets").mkdir()
    batches = (cache_batch(caches, number) for number in range(caches.shards))
    spec = targets_spec(plan, caches.manifest.rotary.rotation, batches)
    job = EvictJob(caches.path, folder / "kv_targets", plan, spec)
    work = job.open()
    for shard in range(caches.shards):
        work(shard).finish()
    finalise(
        job.folder, job.spec, shards=caches.shards, fingerprints=caches.manifest.fingerprints,
        settings={
            **caches.manifest.settings, "evict": evict.model_dump(mode="json", by_alias=True)
        },
    )  # fmt: skip
    store = TargetsStore.open(job.folder)
    return store, OnlineTargets.of(store, folder / "teacher")


def student_of(architecture: str, store: TargetsStore, dropout: float = 0.0) -> LatentReasoner:
    teacher = tiny_model(architecture, torch.float32)
    for module in teacher.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return LatentReasoner.from_teacher(
        teacher,
        latents=store.geometry.slots,
        iterations=2,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=PROMPT,
        eos_token_id=EOS,
        seed=0,
    ).eval()


def losses(
    architecture: str,
    store: TargetsStore,
    online: OnlineTargets | JointTargets | None,
    student: LatentReasoner | None = None,
) -> dict[str, Tensor]:
    student = student or student_of(architecture, store)
    dataset = TargetsDataset(store, chains=True, online=online is not None)
    terms = student_terms(toy_objective(store, w_cot=1.0), Match.of(store), online)
    return terms(student, dataset.__getitems__(ORDER))


CASES = {
    "float32": (Generate(**EXACT), Evict(budget=4, **EXACT)),
    "bfloat16": (Generate(), Evict(budget=4, policy=RKV(lambda_=0.5))),
    "bfloat16, rotated, two layers, a pyramid": (
        Generate(),
        Evict(budget=4, phase="post_rope", layers={"last": 2}, budget_shape="pyramid"),  # type: ignore[arg-type]
    ),
    "the last tokens of steps, alike in all layers and heads": (
        Generate(),
        Evict(budget=3, policy=Steps(), select="record"),
    ),
    "the results of steps": (Generate(), Evict(budget=4, policy=Results())),
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
    store, online = made(tmp_path, architecture, *CASES[case])
    with torch.no_grad():
        stored, anew = losses(architecture, store, None), losses(architecture, store, online)
    assert set(stored) == {"answer", "cot", "codi", "kv"}
    # One number of a thousand may be rounded the other way in a batch of another shape.
    tolerance = 1e-5 if case == "float32" else 5e-4
    for name, value in stored.items():
        assert float(anew[name]) == pytest.approx(float(value), rel=tolerance), name


def test_online_targets_are_the_stored_ones_slot_by_slot(tmp_path: Path) -> None:
    store, online = made(tmp_path, "llama", *CASES["float32"])
    stored = store.batch(ORDER).dequantise()
    anew = online([store.index.record(i) for i in ORDER])
    assert torch.equal(anew.slot_positions, stored.slot_positions)
    assert torch.equal(anew.slot_counts, stored.slot_counts)
    assert torch.equal(anew.slot_mask, stored.slot_mask)
    for name in ("keys", "values", "endpoint"):
        torch.testing.assert_close(getattr(anew, name), getattr(stored, name), rtol=1e-5, atol=1e-5)


def test_rounding_is_seen(tmp_path: Path) -> None:
    """Without it, the targets of a coarse store are others: the equality above says something."""
    store, online = made(tmp_path, "llama", *CASES["codes of 8 bits, merged"])
    exact = replace(online, cache_codec=store_codec(Generate(**EXACT)))
    with torch.no_grad():
        stored, other = losses("llama", store, None), losses("llama", store, exact)
    assert float(other["kv"]) != pytest.approx(float(stored["kv"]), rel=5e-4)
    assert float(other["answer"]) == pytest.approx(float(stored["answer"]), rel=1e-6)


def test_mixed_precision_of_the_student_is_not_the_teachers(tmp_path: Path) -> None:
    store, online = made(tmp_path, "llama", *CASES["float32"])
    records = [store.index.record(i) for i in ORDER]
    alone = online(records)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = online(records)
    for name, value in vars(alone).items():
        assert torch.equal(getattr(within, name), value), name


def test_nothing_of_the_teacher_learns(tmp_path: Path) -> None:
    store, online = made(tmp_path, "llama", *CASES["float32"])
    before = {name: x.clone() for name, x in online.teacher.model.state_dict().items()}
    sum(losses("llama", store, online).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in online.teacher.model.parameters())
    assert all(torch.equal(x, before[n]) for n, x in online.teacher.model.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_student_that_is_its_own_teacher_is_compared_with_what_it_is_now(
    tmp_path: Path, architecture: str
) -> None:
    store, online = made(tmp_path, architecture, *CASES["bfloat16"])
    student = student_of(architecture, store, dropout=0.5).train()
    joint = JointTargets(store, student.decoder)
    records = [store.index.record(i) for i in ORDER]
    for found, expected in zip(slots(joint(records)), slots(online(records)), strict=True):
        assert torch.equal(found, expected)  # it begins as the teacher, and drops nothing out
    assert all(module.training for module in student.modules())
    with torch.no_grad():
        for parameter in student.decoder.parameters():
            parameter.mul_(1.1)
    now = OnlineTargets.of_model(store, copy.deepcopy(student.decoder))
    for found, expected in zip(slots(joint(records)), slots(now(records)), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(joint(records).keys, online(records).keys)


def slots(targets: TargetTensors) -> list[Tensor]:
    return [targets.keys, targets.values, targets.endpoint, targets.slot_positions]


def test_no_gradient_flows_through_a_students_own_targets(tmp_path: Path) -> None:
    store, _ = made(tmp_path, "llama", *CASES["float32"])
    gradients = []
    for own in (True, False):
        student = student_of("llama", store)
        fixed = OnlineTargets.of_model(store, copy.deepcopy(student.decoder))
        targets = JointTargets(store, student.decoder) if own else fixed
        torch.stack(list(losses("llama", store, targets, student).values())).sum().backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(x, gradients[1][name]) for name, x in gradients[0].items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"w_cot": 0.0}, "nothing but w_cot teaches"), ({"model": "other"}, "and `model` names one")],
)
def test_a_student_that_cannot_be_its_own_teacher_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    plain = {"reads": "kv_targets", "targets": "joint", "alpha_kv": 1.0, "w_cot": 1.0}
    with pytest.raises(ValueError, match=said):
        Student.model_validate({**plain, "training": {"steps": 1}, **changes})
