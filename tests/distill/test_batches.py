"""Batches hold every token once, on the right side, whether they come from traces or a store."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core.distill.batches import AnswerDataset, ChainDataset, TargetsDataset, what_is_read
from kava_core.distill.terms import chain_terms
from kava_core.settings import Student
from kava_core.store import Codec
from tests.distill.toy import toy_traces, write_store
from tests.tiny import tiny_model

ORDER = [9, 2, 5, 0]


def unpadded(batch: dict[str, Any], name: str) -> list[list[int]]:
    pairs = zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("chains", [False, True])
def test_a_batch_holds_the_traces_tokens(chains: bool) -> None:
    traces = toy_traces(12)
    batch = AnswerDataset(traces, chains).__getitems__(ORDER)
    chosen = [traces[i] for i in ORDER]
    assert batch["ids"] == [t.id for t in chosen]
    assert unpadded(batch, "question") == [t.question_ids for t in chosen]
    assert unpadded(batch, "answer") == [t.answer_ids for t in chosen]
    assert batch["question_mask"][:, -1].all()  # left-padded: the latents follow at once
    assert batch["answer_mask"][:, 0].all()
    assert ("chain_ids" in batch) == chains
    if chains:
        assert unpadded(batch, "chain") == [
            t.cot_ids + t.answer_prompt_ids + t.answer_ids for t in chosen
        ]
        assert batch["chain_mask"][:, 0].all()


@pytest.mark.parametrize("chains", [False, True])
def test_a_store_gives_the_batches_of_its_traces(tmp_path: Path, chains: bool) -> None:
    traces = toy_traces(12)
    store = write_store(tmp_path / "store", traces, shard_size=5)
    ours = TargetsDataset(store, chains)
    theirs = AnswerDataset(traces, chains)
    assert len(ours) == len(theirs) == 12
    for indices in (ORDER, [3], list(range(12))):
        batch, expected = ours.__getitems__(indices), theirs.__getitems__(indices)
        assert batch.pop("targets").indices == indices
        for row, index in zip(batch.pop("cot_ids").tolist(), indices, strict=True):
            chain = traces[index].cot_ids
            assert row == chain + [0] * (len(row) - len(chain))
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert (
                torch.equal(batch[name], value)
                if isinstance(value, torch.Tensor)
                else batch[name] == value
            ), name


def test_targets_stand_beside_their_own_records(tmp_path: Path) -> None:
    traces = toy_traces(12)
    dataset = TargetsDataset(write_store(tmp_path / "store", traces, shard_size=5), chains=False)
    together = dataset.__getitems__(ORDER)["targets"].dequantise()
    for row, index in enumerate(ORDER):
        alone = dataset.__getitems__([index])["targets"].dequantise()
        for name, value in vars(alone).items():
            assert torch.equal(getattr(together, name)[row], value[0]), name
        lengths = alone.slot_counts.unique().tolist()
        assert lengths == [min(len(traces[index].cot_ids), 4)]


def test_a_dataset_travels_to_loader_processes(tmp_path: Path) -> None:
    dataset = TargetsDataset(write_store(tmp_path / "store", toy_traces(4)), chains=True)
    copied = pickle.loads(pickle.dumps(dataset))
    one, two = (x.__getitems__([1, 3]) for x in (dataset, copied))
    assert torch.equal(one["chain_ids"], two["chain_ids"])
    assert torch.equal(one["targets"].keys.dequantise(), two["targets"].keys.dequantise())


def test_a_teacher_is_taught_from_the_first_token_of_the_chain() -> None:
    traces = toy_traces(12)
    batch = ChainDataset(traces).__getitems__(ORDER)
    for row, index in enumerate(ORDER):
        trace = traces[index]
        chain = trace.cot_ids + trace.answer_prompt_ids + trace.answer_ids
        whole = trace.question_ids + chain
        padding = batch["input_ids"].shape[1] - len(whole)
        assert batch["input_ids"][row].tolist() == whole + [0] * padding
        assert batch["mask"][row].tolist() == [1] * len(whole) + [0] * padding
        assert batch["taught"][row].tolist() == (
            [0] * len(trace.question_ids) + [1] * len(chain) + [0] * padding
        )


def test_the_teachers_loss_is_that_of_each_record_alone() -> None:
    model, dataset = tiny_model("llama"), ChainDataset(toy_traces(12))
    losses = []
    for index in ORDER:
        trace = dataset.traces[index]
        ids = torch.tensor([trace.question_ids + trace.cot_ids + trace.answer_prompt_ids
                            + trace.answer_ids])  # fmt: skip
        logits = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        taught = range(len(trace.question_ids), ids.shape[1])
        losses.append(-sum(float(logits[i - 1, ids[0, i]]) for i in taught) / len(taught))
    actual = chain_terms(model, dataset.__getitems__(ORDER))["chain"]
    assert float(actual) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("bits", [32, 8])
def test_of_targets_no_more_is_read_than_wanted(tmp_path: Path, bits: int) -> None:
    codec = Codec.from_bits(keys=bits, values=bits, endpoint=bits)
    store = write_store(tmp_path / "store", toy_traces(12), shard_size=5, codec=codec)
    whole = TargetsDataset(store, chains=False).__getitems__(ORDER)
    ends = TargetsDataset(store, chains=False, reads="endpoint").__getitems__(ORDER)
    none = TargetsDataset(store, chains=False, reads="none").__getitems__(ORDER)
    assert none.keys() == whole.keys() - {"targets"} == ends.keys() - {"endpoint"}
    assert torch.equal(ends["endpoint"].dequantise(), whole["targets"].endpoint.dequantise())


@pytest.mark.parametrize(
    ("terms", "reads"),
    [({}, "none"), ({"w_cot": 1.0}, "none"), ({"alpha_codi": 1.0}, "endpoint"),
     ({"alpha_kv": {"share": 0.3}}, "all"), ({"alpha_codi": 1.0, "alpha_readout": 1.0}, "all")],
)  # fmt: skip
def test_a_student_reads_what_its_terms_compare(terms: dict[str, Any], reads: str) -> None:
    student = {"reads": "kv_targets", "training": {"steps": 1}, **terms}
    assert what_is_read(Student.model_validate(student)) == reads
