"""A teacher that does without evicted tokens computes what it would with these evicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kava_core.distill.batches import ChainDataset
from kava_core.distill.fit import fit
from kava_core.distill.forgetting import check_forgets, forgetful_terms, steps_of, visible
from kava_core.distill.terms import chain_terms
from kava_core.errors import KavaError
from kava_core.record import Record
from kava_core.settings import Cadence, Teacher, Training
from kava_core.settings.teacher import Forgets
from kava_core.store import ShardShuffleSampler
from tests.tiny import CONFIGS, assert_near, tiny_model, tiny_trace

RECORDS = [tiny_trace(f"r{n}", 3 + n, n, 2, seed=n) for n in (7, 5, 9)]  # in steps of 3
WHOLE = ["gpt2", "llama", "llama-tied-scaled", "qwen2", "qwen3"]


def losses_with_evicted_caches(model: PreTrainedModel, record: Record, keeps: str) -> Tensor:
    """The mean over the chain and the answer, step by step, each read behind what is left of the
    cache of those before it; positions are the original ones."""
    chain, question = record.cot_ids, record.question_ids
    ends = record.step_ends
    kept = record.results if keeps == "results" else [end - 1 for end in ends]
    blocks = [question, *(chain[a:b] for a, b in zip([0, *ends], ends, strict=False))]
    blocks.append(record.answer_prompt_ids + record.answer_ids)
    cache, at, logits = DynamicCache(), 0, []
    left: list[int] = []  # positions of what is in the cache
    for block in blocks:
        places = list(range(at, at + len(block)))
        logits.append(
            model(
                input_ids=torch.tensor([block]),
                position_ids=torch.tensor([places]),
                attention_mask=torch.ones(1, len(left) + len(block), dtype=torch.long),
                past_key_values=cache,
            ).logits[0]
        )
        stay = [p for p in places if at == 0 or p - len(question) in kept]
        columns = torch.tensor([*range(len(left)), *(len(left) + p - at for p in stay)])
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, columns], layer.values[:, :, columns]
        left += stay
        at += len(block)
    taught = torch.tensor([token for block in blocks[1:] for token in block])
    found = torch.cat(logits)[len(question) - 1 : -1].log_softmax(-1)
    return -found.gather(1, taught[:, None]).mean()


def batch_of(keeps: str) -> dict[str, Any]:
    dataset = ChainDataset(RECORDS, lambda records: steps_of(records, keeps))
    return dataset.__getitems__(list(range(len(RECORDS))))


@pytest.mark.parametrize("keeps", ["results", "steps"])
@pytest.mark.parametrize("name", [*WHOLE, "llama-eager"])
def test_the_loss_is_that_behind_an_evicted_cache(name: str, keeps: str) -> None:
    model = tiny_model(name.removesuffix("-eager"))
    expected = [losses_with_evicted_caches(model, record, keeps) for record in RECORDS]
    if name.endswith("-eager"):
        model.set_attn_implementation("eager")
    model.train()
    terms = forgetful_terms(Forgets(keeps=keeps, share=1.0))
    loss = terms(model, batch_of(keeps))["chain"]
    assert_near(loss, torch.stack(expected).mean(), 1e-6)
    whole = chain_terms(model, batch_of(keeps))["chain"]
    assert abs(float((whole - loss).detach())) > 1e-3  # and what was evicted mattered
    assert_near(terms(model.eval(), batch_of(keeps))["chain"], whole, 1e-12)


def test_records_that_do_not_forget_see_all_that_stands_before() -> None:
    batch = batch_of("steps")
    for drawn in ([True, False, True], [False] * 3):
        seen = visible(batch["steps"], batch["kept"], torch.tensor(drawn))
        for row, forgets in zip(seen, drawn, strict=True):
            assert bool(row.diagonal().all()) and not bool(row.triu(1).any())
            assert bool((row == torch.ones_like(row).tril()).all()) == (not forgets)


def test_the_share_is_drawn_anew() -> None:
    model, batch = tiny_model("llama").train(), batch_of("results")
    terms = forgetful_terms(Forgets(keeps="results"))
    torch.manual_seed(0)
    found = [float(terms(model, batch)["chain"].detach()) for _ in range(8)]
    assert len(set(found)) > 1
    torch.manual_seed(0)
    assert float(terms(model, batch)["chain"].detach()) == found[0]


def test_a_teacher_trains_so(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fit(
        model, forgetful_terms(Forgets(keeps="results")),
        ChainDataset(RECORDS, lambda records: steps_of(records, "results")),
        ShardShuffleSampler([3], seed=0),
        Training(steps=3, batch_size=3, precision="bfloat16", gradient_checkpointing=True),
        Cadence(log_every=1),
        folder=tmp_path / "checkpoints", curves=tmp_path / "curves", title="teacher",
    )  # fmt: skip
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_what_cannot_forget_is_refused() -> None:
    for name, config in CONFIGS.items():
        if name in WHOLE:
            check_forgets(config)
        else:
            with pytest.raises(KavaError, match="found one with a sliding window"):
                check_forgets(config)
    bare = Record("bare", [9], [10, 11], [5], [12, 2], "s", "", 1)
    with pytest.raises(KavaError, match="record bare does not say where its results are"):
        steps_of([bare], "results")
    with pytest.raises(ValueError, match="forgets: means nothing at `training: null`"):
        Teacher(model="owner/name", training=None, forgets={"keeps": "steps"})
    assert "forgets" not in Teacher(training=Training(steps=1)).model_dump()
